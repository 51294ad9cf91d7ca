"""Two hosts with their own addresses train together; then one is cut off.

A program, started by test_two_hosts.py and `make reliability`. The hosts are network namespaces
joined by a virtual cable (needs root and `ip`). Prints one JSON object.

    python tests/reliability/two_hosts.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 10.0
SLACK_S = 5.0
#: One step takes at least this long in the run that is cut off.
STEP_S = 0.2

CONFIG = """
from fault_hook import Fault
from toy import ToyData, ToyMethod, toy_collate

model = dict(type=ToyMethod)
train_dataloader = dict(
    dataset=dict(type=ToyData, size=4000), batch_size=2, collate_fn=dict(type=toy_collate)
)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.05), dtype="fp32")
train_cfg = dict(max_iters=20)
randomness = dict(seed=1)
default_hooks = dict(
    dataset_preview=None, loss_curve=None, trainability=None, throughput=None,
    logger=dict(interval=1),
)
custom_hooks = [dict(type=Fault, kind="none", seconds_per_step=0.0)]
env_cfg = dict(dist_cfg=dict(timeout=TIMEOUT_S))
""".replace("TIMEOUT_S", str(TIMEOUT_S))


def why_not() -> str | None:
    """Why this machine cannot play two hosts; None where it can."""
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is not installed"
    name = f"xl{os.getpid()}probe"
    made = _ip(f"netns add {name}", check=False)
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _ip(f"netns del {name}")
    return None


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable; yields their names."""
    names = [f"xl{os.getpid()}a", f"xl{os.getpid()}b"]
    try:
        for name in names:
            _ip(f"netns add {name}")
        _ip(f"-n {names[0]} link add wire0 type veth peer name wire1 netns {names[1]}")
        for number, name in enumerate(names):
            _ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev wire{number}")
            _ip(f"-n {name} link set wire{number} up")
            _ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            _ip(f"netns del {name}", check=False)


def start(names: list[str], folder: Path, run: str, *options: str) -> list[subprocess.Popen]:
    """The command of each host; its output goes to <run>_<number>.txt in ``folder``."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"},
        "PYTHONPATH": os.pathsep.join(
            map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "reliability"])
        ),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for number, name in enumerate(names):
        command = [
            "ip", "netns", "exec", name,
            sys.executable, str(ROOT / "tools" / "train.py"), "cfg.py", "--nproc=1", "--nnodes=2",
            f"--node-rank={number}", "--master-addr=10.77.0.1", "--master-port=29533",
            f"--work-dir={run}", *options,
        ]  # fmt: skip
        with open(folder / f"{run}_{number}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    return processes


def wait(processes: list[subprocess.Popen], timeout_s: float) -> list[int | None]:
    """Their exit codes; None for one that still ran after ``timeout_s``, and is killed."""
    until = time.monotonic() + timeout_s
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            process.kill()
            process.wait()
    return codes


def losses(folder: Path, run: str) -> list[float]:
    """The loss of each step, from the run's metrics."""
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def train_together(names: list[str], folder: Path) -> dict:
    """Both hosts train to the end; the losses are those of two processes on one host."""
    codes = wait(start(names, folder, "together"), 240)
    one_host = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "train.py"), "cfg.py", "--nproc=2",
            "--work-dir=one_host",
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "reliability"])
            ),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert one_host.returncode == 0, one_host.stderr[-2000:]
    ours, theirs = losses(folder, "together"), losses(folder, "one_host")
    return {"exit_codes": codes, "steps": len(ours), "equal_losses": ours == theirs}


def cut_off(names: list[str], folder: Path) -> dict:
    """Mid-way the cable of the second host is cut; what each command then does."""
    options = ("--cfg-options", "train_cfg.max_iters=2000")
    options += (f"custom_hooks.0.seconds_per_step={STEP_S}",)
    processes = start(names, folder, "cut", *options)
    metrics, until = folder / "cut" / "metrics.jsonl", time.monotonic() + 180
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert time.monotonic() < until, (folder / "cut_0.txt").read_text()[-3000:]
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    _ip(f"-n {names[1]} link set wire1 down")
    begin = time.monotonic()
    first = wait(processes[:1], 60)[0]
    seconds = time.monotonic() - begin
    second = wait(processes[1:], 30)[0]
    texts = [(folder / f"cut_{number}.txt").read_text() for number in range(2)]
    return {
        "exit_codes": [first, second],
        "seconds": round(seconds, 1),
        "told": ["\n".join(x for x in text.splitlines() if "rank" in x) for text in texts],
    }


def main() -> None:
    """Both runs, and the verdict."""
    if (reason := why_not()) is not None:
        print(json.dumps({"skipped": reason}))
        return
    with tempfile.TemporaryDirectory() as temporary, two_hosts() as names:
        folder = Path(temporary)
        (folder / "cfg.py").write_text(CONFIG)
        together = train_together(names, folder)
        cut = cut_off(names, folder)
        problems = []
        if together["exit_codes"] != [0, 0]:
            problems.append((folder / "together_0.txt").read_text()[-2000:])
        if not together["equal_losses"] or together["steps"] != 20:
            problems.append("the losses differ from those of one host")
        if None in cut["exit_codes"] or 0 in cut["exit_codes"]:
            problems.append(f"exit codes after the cut: {cut['exit_codes']}")
        if cut["seconds"] > TIMEOUT_S + SLACK_S:
            problems.append(f"the first host ended {cut['seconds']} s after the cut")
        if "rank 1" not in cut["told"][0] or "stopped answering" not in cut["told"][0]:
            problems.append("the first host does not say that rank 1 stopped answering")
        if "rank 0" not in cut["told"][1] or "does not answer" not in cut["told"][1]:
            problems.append("the second host does not say that rank 0 does not answer")
    print(json.dumps({"together": together, "cut": cut, "timeout_s": TIMEOUT_S,
                      "problems": problems}))  # fmt: skip


def _ip(words: str, *, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words.split()], check=check, capture_output=True, text=True)


if __name__ == "__main__":
    main()
