"""Ranks, devices and randomness."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def env_world_size() -> int:
    """Processes that an outside launcher (torchrun) says it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_device() -> torch.device:
    """The CUDA device of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def set_randomness(seed: int | None = None, deterministic: bool = False) -> int:
    """Seed Python, NumPy and torch; return the seed used.

    Args:
        seed: None draws one (it is logged and stored, so the run can be repeated).
        deterministic: use only deterministic CUDA kernels; slower. On the CPU a run repeats bit for
            bit at a fixed thread count anyway.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little") % 2**31
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


def random_state() -> dict:
    """The states of every generator a run draws from."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: dict) -> None:
    """Put the generators back to what ``random_state`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.as_tensor(state["cuda"], dtype=torch.uint8))
