"""--nproc and its kin: what is refused before a start, what is started, and the exit code."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.reliability.forked_ranks import running_in
from xtuner_lite.cli import _launch, _supervisor, train
from xtuner_lite.cli._launch import LaunchError, Plan, threads_per_rank
from xtuner_lite.cli._supervisor import Supervisor
from xtuner_lite.cli.main import main

ROOT = Path(__file__).parents[2]

CONFIG = """
from fault_hook import Fault
from toy import ToyData, ToyMethod, toy_collate

model = dict(type=ToyMethod)
train_dataloader = dict(
    dataset=dict(type=ToyData, size=4000), batch_size=2, collate_fn=dict(type=toy_collate)
)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.05), dtype="fp32")
train_cfg = dict(max_iters=1000)
randomness = dict(seed=1)
default_hooks = dict(dataset_preview=None, loss_curve=None, trainability=None, throughput=None)
custom_hooks = [dict(type=Fault, seconds_per_step=0.05)]
"""


@pytest.fixture()
def toy_project(tmp_path, monkeypatch) -> Path:
    """The working folder, with cfg.py; its modules can be imported."""
    (tmp_path / "cfg.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    for folder in (ROOT / "tests" / "reliability", ROOT / "tests"):
        monkeypatch.syspath_prepend(str(folder))
    return tmp_path


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


# --- refused before anything is started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nproc=0), "--nproc 0 --nnodes 1: both must be at least 1"),
        (dict(nnodes=2, node_rank=2, master_addr="a"), "from 0 to 1"),
        (dict(nnodes=2), "--nnodes 2 needs --master-addr"),
    ],
)
def test_plans_that_cannot_be(options, message):
    with pytest.raises(LaunchError, match=message):
        Plan(**options)
    assert LaunchError.exit_code == 2


def test_more_ranks_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(LaunchError, match=r"--nproc 2, but this machine has 1 GPU.*Set --nproc 1"):
        Plan(nproc=2).check_devices()
    Plan(nproc=1).check_devices()


@pytest.fixture()
def no_start(monkeypatch):
    """What would have been started: [(plan, module, words)]."""
    started = []
    monkeypatch.setattr(_launch, "launch", lambda *args: started.append(args) or 0, raising=True)
    return started


def test_a_refused_config_starts_nothing(toy_project, no_start, capsys):
    words = ["train", "cfg.py", "--nproc", "2", "--cfg-options", "train_cfg.max_itres=3"]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert no_start == []


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (["--launcher", "slurm"], {}, "with --launcher slurm they are started already"),
        ([], {"WORLD_SIZE": "4"}, "an outside launcher started 4 processes"),
        (["--strategy", "single"], {}, "strategy SingleDevice runs in one process, and 2"),
        (["--nnodes", "2"], {}, "--nnodes 2 needs --master-addr"),
    ],
)
def test_what_does_not_fit_with_nproc(
    toy_project, no_start, capsys, monkeypatch, words, environ, message
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "cfg.py", "--nproc", "2", *words]) == 2
    assert message in capsys.readouterr().err
    assert no_start == []


def test_strategy_and_deepspeed_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parse("cfg.py", "--strategy", "ddp", "--deepspeed", "zero2")
    assert "not allowed with" in capsys.readouterr().err


def test_only_the_first_of_outside_ranks_tells_a_refusal(toy_project, monkeypatch, capsys):
    words = ["train", "cfg.py", "--launcher", "slurm", "--cfg-options", "no_such_key=1"]
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(words) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(words) == 2
    assert "no_such_key" in capsys.readouterr().err


# --- what is started


def test_nproc_takes_ddp(toy_project, no_start):
    assert main(["train", "cfg.py", "--nproc", "2", "--resume"]) == 0
    plan, module, words = no_start[0]
    assert (plan.nproc, plan.world_size, module) == (2, 2, "xtuner_lite.cli.main")
    assert words == ["train", "cfg.py", "--strategy=ddp", "--launcher=pytorch", "--resume"]


def test_the_configs_own_strategy_is_kept(toy_project, no_start):
    options = ["--cfg-options", "strategy={'type': 'DDP', 'bucket_cap_mb': 3}"]
    assert main(["train", "cfg.py", "--nproc", "2", *options]) == 0
    assert not any(word.startswith("--strategy") for word in no_start[0][2])


def test_one_process_is_not_started_but_run(toy_project, no_start, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "_train", lambda args: trained.append(args) or 0)
    assert main(["train", "cfg.py", "--nproc", "1"]) == 0
    assert len(trained) == 1
    assert no_start == []


def test_words_of_a_rank_give_the_same_options():
    words = [
        "cfg.py", "--plugin", "a.py", "--plugin", "b.py", "--work-dir", "w d", "--load-from", "x",
        "--seed", "3", "--deepspeed", "zero2", "--resume", "some path", "--deterministic",
        "--cfg-options", "a.b=1", "c={'d': 'e f'}",
    ]  # fmt: skip
    args = parse(*words, "--nproc", "4", "--nnodes", "2", "--node-rank", "1", "--master-addr", "h")
    again = vars(parse(*train.words_of_rank(args)))
    given = vars(args)
    assert again.pop("launcher") == "pytorch"
    launch_options = {"nproc", "nnodes", "node_rank", "master_addr", "master_port", "local_rank"}
    for name in set(given) - launch_options - {"launcher"}:
        assert again[name] == given[name], name
    assert again["nproc"] is None


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--deepspeed", "my ds.json"], ["strategy={'type': 'DeepSpeed', 'config': 'my ds.json'}"]),
        (["--strategy", "fsdp2"], ["strategy={'type': 'FSDP2'}"]),
        (
            ["--strategy", "ddp", "--launcher", "mpi"],
            ["strategy={'type': 'DDP'}", "launcher='mpi'"],
        ),
        ([], []),
    ],
)
def test_scale_options_become_settings(words, options):
    assert train._options_of(parse("cfg.py", *words)) == options


def test_torchrun_words():
    words = Plan(nproc=2).torchrun_words()
    assert "--master-addr=127.0.0.1" in words
    port = next(int(word.partition("=")[2]) for word in words if word.startswith("--master-port"))
    assert port > 1023
    words = Plan(nproc=8, nnodes=2, node_rank=1, master_addr="10.0.0.1").torchrun_words()
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=8"} <= set(words)
    assert {"--master-addr=10.0.0.1", "--master-port=29500"} <= set(words)


def test_threads_are_shared():
    cores = threads_per_rank(1)
    assert threads_per_rank(2) == max(1, cores // 2)
    assert threads_per_rank(10_000) == 1


# --- the supervisor, with small programs for ranks


class ProgramAgent:
    """Starts ``python -c program`` for each rank; the program has the launch folder as argv[1]."""

    def __init__(self, folder: Path, programs: list[str]) -> None:
        self.folder, self.programs, self.error = folder, programs, None
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        for rank, program in enumerate(self.programs):
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(self.folder)], start_new_session=True
            )
            self.processes.append(process)
            (self.folder / f"rank_{rank}.json").write_text(json.dumps({"pid": process.pid}))

    def is_alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def exit_codes(self) -> dict[int, int]:
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        return {rank: code for rank, code in codes.items() if code}

    def left_behind(self) -> list[int]:
        return running_in({process.pid for process in self.processes})


WAIT = "import time; time.sleep(60)"
WORKER = "import subprocess, sys; subprocess.Popen(['sleep', '60']); "


def supervise(folder: Path, programs: list[str], monkeypatch) -> tuple[int, list[int]]:
    monkeypatch.setattr(_supervisor, "GRACE_S", {"error": 1.0, "undecided": 0.5, "else": 0.3})
    agent = ProgramAgent(folder, programs)
    code = Supervisor(folder, len(programs), agent).run()
    return code, agent.left_behind()


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        ("import os; os._exit(3)", 3, "rank 1 ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", 139, "rank 1 was killed by SIGSEGV"),
    ],
)
def test_the_first_failure_gives_the_exit_code(tmp_path, monkeypatch, capsys, program, code, told):
    assert supervise(tmp_path, [WAIT, program], monkeypatch) == (code, [])
    assert told in capsys.readouterr().err


def test_all_well(tmp_path, monkeypatch, capsys):
    assert supervise(tmp_path, ["pass", "pass"], monkeypatch) == (0, [])
    assert capsys.readouterr().err == ""


def test_loader_workers_go_with_their_rank(tmp_path, monkeypatch):
    killed = WORKER + "import os; os.kill(os.getpid(), 9)"
    assert supervise(tmp_path, [WORKER + WAIT, killed], monkeypatch) == (137, [])


def test_what_the_ranks_agreed_on_counts(tmp_path, monkeypatch, capsys):
    failure = {"kind": "error", "rank": 0, "exit_code": 5}
    tell = f"open(sys.argv[1] + '/failure.json', 'w').write({json.dumps(failure)!r})"
    rank = f"import sys, time; {tell}; time.sleep(60)"
    assert supervise(tmp_path, [rank, "import os; os._exit(1)"], monkeypatch) == (5, [])
    assert "rank 0 failed first, by the error above" in capsys.readouterr().err


SAVES = (
    "import signal, sys, time, json\n"
    "got = []\n"
    "signal.signal(signal.SIGTERM, lambda *a: got.append(1))\n"
    "open(sys.argv[1] + '/ready' + str(time.time()), 'w')\n"
    "while not got: time.sleep(0.01)\n"
    "time.sleep(1.0)\n"  # longer than the grace after a failure: saving takes its time
    "assert len(got) == 1\n"
    "open(sys.argv[1] + '/interrupted_0.json', 'w').write(json.dumps({'signal': 15}))\n"
)


def test_a_signal_reaches_each_rank_once(tmp_path, monkeypatch, capsys):
    _signal_when_ready(tmp_path, 2)
    assert supervise(tmp_path, [SAVES, SAVES], monkeypatch) == (143, [])
    assert "SIGTERM: the processes finish their step" in capsys.readouterr().err


def test_a_second_signal_kills(tmp_path, monkeypatch, capsys):
    stubborn = SAVES.replace("time.sleep(1.0)", "time.sleep(60)")
    _signal_when_ready(tmp_path, 1, times=2)
    assert supervise(tmp_path, [stubborn], monkeypatch) == (143, [])
    assert "SIGTERM again: the processes are killed" in capsys.readouterr().err


def _signal_when_ready(folder: Path, ranks: int, times: int = 1) -> None:
    def send() -> None:
        while len(list(folder.glob("ready*"))) < ranks:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


# --- the command


def start_command(folder: Path, *words: str) -> subprocess.Popen:
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "reliability"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), "cfg.py", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip


def wait_for_steps(folder: Path, number: int) -> None:
    metrics, until = folder / "w" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
        assert time.monotonic() < until
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.read_text().rpartition(")")[2].split()[1] == str(pid)
    ]


def test_nproc_2_saves_on_sigterm(tmp_path):
    (tmp_path / "cfg.py").write_text(CONFIG)
    command = start_command(tmp_path, "--nproc=2", "--work-dir=w")
    wait_for_steps(tmp_path, 3)
    ranks = set(children_of(command.pid))
    assert len(ranks) == 2
    command.send_signal(signal.SIGTERM)
    output, _ = command.communicate(timeout=120)
    assert command.returncode == 143, output
    assert "starting 2 process(es), OMP_NUM_THREADS=1 each" in output
    assert "continue with --resume" in output
    assert "Traceback" not in output
    assert len(list((tmp_path / "w" / "checkpoints").glob("iter_*"))) == 1
    assert running_in(ranks) == []


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    """The signal goes to the whole foreground group; the ranks are not in it."""
    (tmp_path / "cfg.py").write_text(CONFIG)
    command = start_command(tmp_path, "--nproc=2", "--work-dir=w")
    wait_for_steps(tmp_path, 3)
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=120)
    assert command.returncode == 130, output
    assert "continue with --resume" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing(tmp_path):
    (tmp_path / "cfg.py").write_text(CONFIG)
    command = start_command(tmp_path, "--nproc=2", "--work-dir=w")
    wait_for_steps(tmp_path, 3)
    ranks = set(children_of(command.pid))
    command.kill()
    command.communicate(timeout=60)
    until = time.monotonic() + 10
    while running_in(ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(ranks) == 2
    assert running_in(ranks) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_variables_of_outside_launchers(tmp_path, launcher):
    """Two processes with the variables that srun and mpirun set."""
    (tmp_path / "cfg.py").write_text(CONFIG)
    port, processes = _launch.free_port(), []
    names = {
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }[launcher]
    for rank in range(2):
        environ = dict(zip(names, (str(rank), "2", str(rank)), strict=True))
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if launcher == "slurm":
            environ["SLURM_NODELIST"] = "localhost"
        paths = [ROOT, ROOT / "tests", ROOT / "tests" / "reliability"]
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "train.py"), "cfg.py", "--work-dir=w",
                 f"--launcher={launcher}", "--cfg-options", "train_cfg.max_iters=5"],
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **environ, "OMP_NUM_THREADS": "1",
                     "PYTHONPATH": os.pathsep.join(map(str, paths))},
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(list((tmp_path / "w" / "checkpoints").glob("iter_5"))) == 1
