"""Back-ends of the visualizer where MMEngine's fall short.

Measured with mmengine 0.10.7: its TensorboardVisBackend works, but keeps no texts. WandbVisBackend
throws the step away, so that W&B numbers the lines instead of the optimizer steps, and uploads
every Python file under the current folder. MLflowVisBackend always opens a file store, which MLflow
3.17 refuses, and copies every JSON file below work_dir at the end. There is none for SwanLab.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.visualization import TensorboardVisBackend as _MMTensorboardVisBackend
from mmengine.visualization import WandbVisBackend as _MMWandbVisBackend
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env

from xtuner_lite.registry import VISBACKENDS


@VISBACKENDS.register_module()
class TensorboardVisBackend(_MMTensorboardVisBackend):
    """TensorBoard event files in ``save_dir``; look with ``tensorboard --logdir WORK_DIR``.

    Args:
        save_dir: folder of the event files.
    """

    @force_init_env
    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text at an optimizer step, shown as it is."""
        indented = "\n".join("    " + line for line in text.splitlines())  # a Markdown code block
        self._tensorboard.add_text(name, indented, step)


@VISBACKENDS.register_module()
class WandbVisBackend(_MMWandbVisBackend):
    """Weights & Biases; the x axis counts optimizer steps.

    Args:
        save_dir: folder of W&B's local files.
        init_kwargs: arguments of ``wandb.init``, e.g. dict(project="...", mode="offline").
        log_code_name: name of a code artifact. None uploads no code (MMEngine always does).
        define_metric_cfg: see mmengine.visualization.WandbVisBackend.
    """

    def __init__(
        self,
        save_dir: str,
        init_kwargs: dict[str, Any] | None = None,
        define_metric_cfg: dict | list | None = None,
        log_code_name: str | None = None,
    ) -> None:
        super().__init__(
            save_dir, dict(init_kwargs or {}), define_metric_cfg, log_code_name=log_code_name
        )

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Sets the run's config."""
        self._wandb.config.update(_plain(config.to_dict()), allow_val_change=True)
        if self._log_code_name is not None:
            self._wandb.run.log_code(name=self._log_code_name)

    @force_init_env
    def add_scalar(self, name: str, value: float, step: int = 0, **kwargs: Any) -> None:
        """One value at an optimizer step."""
        self._wandb.log({name: value}, step=step)

    @force_init_env
    def add_scalars(
        self,
        scalar_dict: dict[str, float],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Several values at an optimizer step."""
        self._wandb.log(scalar_dict, step=step)

    @force_init_env
    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text at an optimizer step, as preformatted HTML."""
        import html

        self._wandb.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Ends the W&B run."""
        if hasattr(self, "_wandb"):
            self._wandb.finish()


@VISBACKENDS.register_module()
class MLflowVisBackend(BaseVisBackend):
    """MLflow, on a server or in a local SQLite file.

    Args:
        save_dir: folder of the local store.
        exp_name: experiment; made when missing.
        run_name: name of the run; MLflow makes one up when None.
        tags: tags of the run.
        params: parameters of the run beside its config.
        tracking_uri: server. None: the environment's MLFLOW_TRACKING_URI, else
            ``sqlite:///<save_dir>/mlflow.db`` (look with
            ``mlflow ui --backend-store-uri sqlite:///<save_dir>/mlflow.db``).
        artifact_location: where a new experiment keeps files; None lets the store choose.
    """

    _MAX_PARAM_CHARS = 500  # the least that any MLflow store takes
    _PARAMS_PER_CALL = 100  # MLflow's limit of a batch

    def __init__(
        self,
        save_dir: str,
        exp_name: str = "xtuner_lite",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
    ) -> None:
        super().__init__(save_dir)
        self._exp_name, self._run_name = exp_name, run_name
        self._tags, self._params = tags, params
        self._tracking_uri, self._artifact_location = tracking_uri, artifact_location

    def _init_env(self) -> None:
        import mlflow

        uri, artifacts = self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            folder = Path(self._save_dir).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()
        mlflow.set_tracking_uri(uri)
        if mlflow.get_experiment_by_name(self._exp_name) is None:
            location = self._artifact_location or artifacts
            mlflow.create_experiment(self._exp_name, artifact_location=location)
        mlflow.set_experiment(self._exp_name)
        self._run = mlflow.start_run(run_name=self._run_name, tags=self._tags)
        self._mlflow = mlflow
        self._log_params(self._params or {})

    @property
    @force_init_env
    def experiment(self) -> Any:
        """The ``mlflow`` module, its run started."""
        return self._mlflow

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """The config as parameters (flattened, long values cut) and, whole, as a file."""
        self._log_params(_flatten(_plain(config.to_dict())))
        self._mlflow.log_text(config.pretty_text, "config.py")

    @force_init_env
    def add_scalar(self, name: str, value: float, step: int = 0, **kwargs: Any) -> None:
        """One value at an optimizer step."""
        self._mlflow.log_metric(name, float(value), step)

    @force_init_env
    def add_scalars(
        self,
        scalar_dict: dict[str, float],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Several values at an optimizer step."""
        self._mlflow.log_metrics({k: float(v) for k, v in scalar_dict.items()}, step)

    @force_init_env
    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text at an optimizer step, as the file ``<name>_<step>.txt``."""
        self._mlflow.log_text(text, f"{name}_{step}.txt")

    def close(self) -> None:
        """Ends the MLflow run."""
        if hasattr(self, "_mlflow"):
            self._mlflow.end_run()

    def _log_params(self, params: dict[str, Any]) -> None:
        items = [(key, str(value)[: self._MAX_PARAM_CHARS]) for key, value in params.items()]
        for start in range(0, len(items), self._PARAMS_PER_CALL):
            self._mlflow.log_params(dict(items[start : start + self._PARAMS_PER_CALL]))


@VISBACKENDS.register_module()
class SwanLabVisBackend(BaseVisBackend):
    """SwanLab, in the cloud or local.

    Args:
        save_dir: folder of SwanLab's local files.
        init_kwargs: arguments of ``swanlab.init``, e.g. dict(project="...", mode="local").
    """

    def __init__(self, save_dir: str, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(save_dir)
        self._init_kwargs = dict(init_kwargs or {})

    def _init_env(self) -> None:
        import swanlab

        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        places = {"log_dir", "logdir"} & set(self._init_kwargs)  # its old and its new name
        if not places:
            self._init_kwargs["log_dir"] = self._save_dir
        self._swanlab = swanlab
        self._run = swanlab.init(**self._init_kwargs)

    @property
    @force_init_env
    def experiment(self) -> Any:
        """The ``swanlab`` module, its run started."""
        return self._swanlab

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Sets the run's config."""
        self._swanlab.config.update(_plain(config.to_dict()))

    @force_init_env
    def add_scalar(self, name: str, value: float, step: int = 0, **kwargs: Any) -> None:
        """One value at an optimizer step."""
        self._swanlab.log({name: float(value)}, step=step)

    @force_init_env
    def add_scalars(
        self,
        scalar_dict: dict[str, float],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Several values at an optimizer step."""
        self._swanlab.log({k: float(v) for k, v in scalar_dict.items()}, step=step)

    @force_init_env
    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text at an optimizer step."""
        self._swanlab.log({name: self._swanlab.Text(text)}, step=step)

    def close(self) -> None:
        """Ends the SwanLab run."""
        if hasattr(self, "_swanlab"):
            self._swanlab.finish()


def _plain(value: Any) -> Any:
    """A config value of dicts, lists, numbers and texts; classes and functions by their name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", None) or str(value)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
