"""Environments of the tools we compare with: one folder each, pinned, built once and kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

#: name -> pip requirements, in the order they are installed (torch alone first, so that the other
#: packages cannot choose another one).
PEERS: dict[str, list[list[str]]] = {
    "trl-1.16.0": [
        ["torch==2.13.0"],
        [
            "trl==1.16.0",
            "transformers==5.23.0",
            "peft==0.21.2",
            "datasets==5.2.0",
            "accelerate==1.15.0",
        ],
    ],
}


def peers_folder() -> Path:
    """Where the environments lie: ``$XDG_CACHE_HOME/xtuner_lite/peers``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "xtuner_lite" / "peers"


def peer_python(name: str) -> Path:
    """The interpreter of the peer's environment, which is built first if it is not there.

    A half-built environment (no ``pins.json``, or other pins) is removed and built anew.

    Raises:
        KeyError: no peer of this name.
        subprocess.CalledProcessError: pip failed; its output stands above.
    """
    if name not in PEERS:
        raise KeyError(f"unknown peer {name!r}; known are {sorted(PEERS)}")
    folder = peers_folder() / name
    python = folder / "bin" / "python"
    receipt = folder / "pins.json"
    pins = {"python": sys.version.split()[0], "install": PEERS[name]}
    if receipt.exists() and json.loads(receipt.read_text()) == pins and python.exists():
        return python
    print(f"building {folder} (once, a few minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for requirements in PEERS[name]:
        command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(command, check=True)
    receipt.write_text(json.dumps(pins, indent=1))
    return python
