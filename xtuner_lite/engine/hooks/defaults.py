"""The hooks every run gets. A config changes one by its key in ``default_hooks``; None drops it."""

from __future__ import annotations

from typing import Any

#: name -> config. ``default_hooks=dict(logger=dict(interval=50), loss_curve=None)`` in a config
#: changes the first and drops the second. Names that MMEngine has too keep MMEngine's name.
DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "RunInfoHook"},
    "timer": {"type": "IterTimerHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "throughput": {"type": "ThroughputHook"},
    "nan_guard": {"type": "NonFiniteGuardHook"},
    "loss_spike": {"type": "LossSpikeHook"},
    "trainability": {"type": "TrainabilityReportHook"},
    "dataset_preview": {"type": "DatasetPreviewHook"},
    "logger": {"type": "LoggerHook"},
    "checkpoint": {"type": "CheckpointHook"},
    "loss_curve": {"type": "LossCurveHook"},
}
