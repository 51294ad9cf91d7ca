import importlib.util
import json

import pytest
from mmengine.config import Config

from xtuner_lite.engine.visualization import build_visualizer


def backends(*configs):
    return {"vis_backends": list(configs)}


def test_none_needs_nothing(tmp_path):
    visualizer = build_visualizer(None, str(tmp_path))
    visualizer.add_scalars({"train/loss": 1.0}, step=1)
    visualizer.add_text("chat", "hello", step=1)
    visualizer.close()
    visualizer.close()
    assert list(tmp_path.iterdir()) == []


def test_mmengine_finds_it_as_the_current_visualizer(tmp_path):
    from mmengine.visualization import Visualizer

    visualizer = build_visualizer({"type": "Visualizer"}, str(tmp_path))
    assert Visualizer.get_current_instance() is visualizer
    assert build_visualizer(visualizer, str(tmp_path)) is visualizer


@pytest.mark.parametrize(
    ("backend", "package"),
    [
        ("TensorboardVisBackend", "tensorboard"),
        ("WandbVisBackend", "wandb"),
        ("MLflowVisBackend", "mlflow"),
        ("SwanLabVisBackend", "swanlab"),
    ],
)
def test_a_missing_package_names_the_pip_command(tmp_path, monkeypatch, backend, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )
    with pytest.raises(ImportError, match=f"names {backend}, .* Run: pip install {package}"):
        build_visualizer(backends({"type": backend}), str(tmp_path))


def test_wrong_forms_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"vis_backends is a str; it must be a list"):
        build_visualizer({"vis_backends": "TensorboardVisBackend"}, str(tmp_path))
    with pytest.raises(TypeError, match="without a type; name a back-end, one of Tensorboard"):
        build_visualizer(backends({"save_dir": "x"}), str(tmp_path))


def test_other_ranks_start_nothing(tmp_path):
    visualizer = build_visualizer(
        backends({"type": "LocalVisBackend"}), str(tmp_path), is_main=False
    )
    visualizer.add_scalars({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_secrets_do_not_reach_a_back_end(tmp_path):
    cfg = Config({"model": {"path": "x"}, "hub": {"api_key": "sk-1234567890"}})
    build_visualizer(backends({"type": "LocalVisBackend"}), str(tmp_path), cfg=cfg).close()
    written = (tmp_path / "vis_data" / "config.py").read_text()
    assert "path='x'" in written
    assert "sk-1234567890" not in written


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    visualizer = build_visualizer(backends({"type": "TensorboardVisBackend"}), str(tmp_path))
    visualizer.add_scalars({"train/loss": 2.0, "train/lr": 0.1}, step=10)
    visualizer.add_scalar("val/loss", 1.5, step=10)
    visualizer.add_text("chat", "Who are you?\nA helper.", step=10)
    visualizer.close()
    events = EventAccumulator(str(tmp_path / "vis_data"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(10, 1.5)]
    text = events.Tensors("chat/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    Who are you?\n    A helper."


def test_mlflow_without_a_server_keeps_a_local_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    visualizer = build_visualizer(
        backends({"type": "MLflowVisBackend", "run_name": "tiny"}), str(tmp_path / "logs")
    )
    visualizer.add_config(Config({"a": {"b": [1, 2]}, "long": "x" * 9000}))
    visualizer.add_scalars({"train/loss": 2.0}, step=10)
    visualizer.add_text("chat", "hello", step=10)
    visualizer.close()
    (run,) = mlflow.search_runs(experiment_names=["xtuner_lite"], output_format="list")
    assert run.info.run_name == "tiny"
    assert run.data.params["a.b"] == "[1, 2]"
    (point,) = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert (point.step, point.value) == (10, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]  # nothing beside it


def test_wandb_counts_optimizer_steps(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged = []
    visualizer = build_visualizer(
        backends({"type": "WandbVisBackend", "init_kwargs": {"mode": "disabled"}}), str(tmp_path)
    )
    monkeypatch.setattr(wandb, "log", lambda values, step: logged.append((values, step)))
    visualizer.add_scalars({"train/loss": 2.0}, step=10)
    visualizer.add_scalar("val/loss", 1.0, step=10)
    visualizer.close()
    assert logged == [({"train/loss": 2.0}, 10), ({"val/loss": 1.0}, 10)]


def test_swanlab(tmp_path):
    pytest.importorskip("swanlab")
    visualizer = build_visualizer(
        backends({"type": "SwanLabVisBackend", "init_kwargs": {"mode": "disabled"}}), str(tmp_path)
    )
    visualizer.add_config(Config({"a": 1}))
    visualizer.add_scalars({"train/loss": 2.0}, step=10)
    visualizer.add_text("chat", "hello", step=10)
    visualizer.close()


def test_mmengines_class_gives_our_back_end(tmp_path):
    from mmengine.visualization import TensorboardVisBackend

    pytest.importorskip("tensorboard")
    visualizer = build_visualizer(backends({"type": TensorboardVisBackend}), str(tmp_path))
    backend = visualizer.get_backend("TensorboardVisBackend")
    assert type(backend).__module__ == "xtuner_lite.engine.vis_backends"
    visualizer.close()


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path, monkeypatch):
    from mmengine.visualization import LocalVisBackend

    from xtuner_lite.engine import run_visualizer

    warnings = []
    monkeypatch.setattr(run_visualizer, "print_log", lambda text, **_: warnings.append(text))

    class Away(LocalVisBackend):
        def add_scalars(self, *args, **kwargs):
            raise ConnectionError("the server is away")

    visualizer = build_visualizer(
        backends(Away(save_dir=str(tmp_path / "a")), {"type": "LocalVisBackend"}), str(tmp_path)
    )
    for step in (1, 2):
        visualizer.add_scalars({"loss": 1.0}, step=step)
    lines = (tmp_path / "vis_data" / "scalars.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len(warnings) == 1
    assert warnings[0].startswith("Away.add_scalars failed: ConnectionError: the server is away.")
