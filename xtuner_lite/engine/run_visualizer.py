"""The visualizer of a run: MMEngine's, made safe against trackers that fail."""

from __future__ import annotations

import itertools
import logging
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.visualization import Visualizer
from mmengine.visualization.vis_backend import BaseVisBackend

_numbers = itertools.count(1)


class RunVisualizer(Visualizer):
    """MMEngine's Visualizer whose back-ends cannot end a training.

    A tracking server that is away for a minute makes a warning (one for each back-end and kind of
    call), not the end of a run of days; ``metrics.jsonl`` has every value anyway.

    Args:
        name: MMEngine keeps visualizers by name for the life of the process; None takes a new one.
        vis_backends: back-ends that are built already.
        **options: see mmengine.visualization.Visualizer.
    """

    def __init__(
        self,
        name: str | None = None,
        vis_backends: list[BaseVisBackend] | None = None,
        **options: Any,
    ) -> None:
        name = name or f"visualizer_{next(_numbers)}"
        super().__init__(name=name, vis_backends=vis_backends, **options)
        self._warned: set[tuple[str, str]] = set()
        self._closed = False
        Visualizer._instance_dict[name] = self  # what Visualizer.get_current_instance() gives

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Calls ``method`` on every back-end that has it."""
        for name, backend in self._vis_backends.items():
            function = getattr(backend, method, None)
            if function is None:
                continue
            try:
                function(*args, **kwargs)
            except Exception as error:  # whatever a server or its client raises; told below
                if (name, method) not in self._warned:
                    self._warned.add((name, method))
                    print_log(
                        f"{name}.{method} failed: {type(error).__name__}: {error}. The run goes "
                        "on, this back-end may miss values; they are in metrics.jsonl.",
                        logger="current",
                        level=logging.WARNING,
                    )

    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Hands the config over; its secrets must be redacted already."""
        self._each("add_config", config, **kwargs)

    def add_scalar(self, name: str, value: float, step: int = 0, **kwargs: Any) -> None:
        """One value after ``step`` optimizer steps."""
        self._each("add_scalar", name, value, step, **kwargs)

    def add_scalars(
        self,
        scalar_dict: dict[str, float],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Several values after ``step`` optimizer steps."""
        self._each("add_scalars", scalar_dict, step, file_path, **kwargs)

    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """A text after ``step`` optimizer steps, to the back-ends that keep texts."""
        self._each("add_text", name, text, step)

    def close(self) -> None:
        """Ends the back-ends; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._each("close")
