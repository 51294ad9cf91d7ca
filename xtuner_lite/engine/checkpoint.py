"""Checkpoint folders: written aside and renamed, listed in a manifest, verified before use.

A checkpoint is ``work_dir/checkpoints/iter_<steps>``:

    adapter_model.safetensors, adapter_config.json     what other tools open (or model.safetensors,
    tokenizer files, generation_config.json            config.json); see methods/base.py
    trainer/                                           what a resume needs: JSON and safetensors
    only
    config.py                                          the run's config, secrets redacted
    manifest.json                                      size and sha256 of every other file

At every moment of a save the older checkpoints are whole: the new folder gets its name last, by one
rename, after everything in it was flushed to the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xtuner_lite.engine.distributed import Ranks

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TRAINER_DIR = "trainer"
_NAME = re.compile(r"iter_(\d+)(\.replaced-\d+)?$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be used; says which file and why."""


def checkpoints_dir(work_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(work_dir) / "checkpoints"


def checkpoint_name(num_steps: int) -> str:
    """Folder name of the checkpoint after ``num_steps`` optimizer steps."""
    return f"iter_{num_steps}"


def list_checkpoints(work_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest last. Half-written ones have another name."""
    folder = checkpoints_dir(work_dir)
    if not folder.is_dir():
        return []
    found = [
        (match, path)
        for path in folder.iterdir()
        if (match := _NAME.match(path.name)) and path.is_dir()
    ]
    return [
        path
        for match, path in sorted(found, key=lambda item: (int(item[0][1]), item[0][2] is None))
    ]


def write_checkpoint(
    target: Path, write: Callable[[Path], None], ranks: Ranks | None = None
) -> Path:
    """Make the checkpoint folder ``target`` from what ``write(folder)`` puts into an empty folder.

    Args:
        write: called on every rank with the same folder; it may fail on one rank, so it must not
            wait for others, unless all of them come there whatever fails.
        ranks: the processes of the run; all call this together. None is this one.

    Raises:
        CheckpointError: the disk is full or not writable, or ranks see different disks; older
            checkpoints are untouched and nothing half-written is left.
        PeerError: another rank could not write its part.
    """
    ranks = ranks or Ranks()
    aside = Path(ranks.on_main(lambda: str(begin_checkpoint(target))))
    try:
        with ranks.together():
            check_shared(aside)
        with ranks.together(), told_where_full(target):
            write(aside)
        with ranks.together(), told_where_full(target):
            if ranks.is_main:
                finish_checkpoint(aside, target)
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def begin_checkpoint(target: Path) -> Path:
    """An empty folder beside ``target``; what a killed process left half-written is removed."""
    with told_where_full(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target.parent)
        aside = target.parent / f".writing-{target.name}-{os.getpid()}"
        aside.mkdir()
    return aside


def check_shared(aside: Path) -> None:
    """Raises CheckpointError where this rank does not see the folder that the main rank made."""
    if not aside.is_dir():
        raise CheckpointError(
            f"{aside.parent} on {os.uname().nodename} is not the folder that the first rank "
            "writes to. Put work_dir on storage that all machines share."
        )


def finish_checkpoint(aside: Path, target: Path) -> None:
    """Manifest, flush, and the one rename that makes the checkpoint visible."""
    _write_manifest(aside)
    _flush_tree(aside)
    _publish(aside, target)


@contextmanager
def told_where_full(target: Path) -> Iterator[None]:
    """Turn the many forms of 'no space left' into one CheckpointError."""
    try:
        yield
    except BaseException as error:
        if _is_no_space(error):
            free_mb = shutil.disk_usage(target.parent).free // 2**20
            raise CheckpointError(
                f"the checkpoint {target} could not be written: no space left on the disk "
                f"({free_mb} MiB free). "
                "Older checkpoints are whole. Free some space, or lower "
                "checkpoint.max_keep_ckpts, and --resume."
            ) from error
        raise


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: no manifest, a file that is missing, changed or cut short, or a file among
            the training state that the manifest does not list.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} is no checkpoint of a run: {MANIFEST} is missing")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files, version, digest = manifest["files"], manifest["format_version"], manifest["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest_path} is damaged: {type(error).__name__}: {error}"
        ) from error
    if digest != _digest(files, version):
        raise CheckpointError(
            f"{manifest_path} is damaged: its own digest does not fit its list of files"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}; "
            "upgrade xtuner_lite"
        )
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    for name, entry in files.items():
        file = path / name
        if name not in present:
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{file} has {size} bytes, {entry['size']} were written")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} was changed after it was written (sha256 differs)")
    for name in sorted(present - set(files)):  # a note beside the weights does no harm, state does
        if name.startswith(TRAINER_DIR + "/"):
            raise CheckpointError(f"{path / name} was not written with the checkpoint; remove it")


def newest_valid_checkpoint(
    work_dir: str | Path,
    warn: Callable[[str], None],
    *,
    wanted: Callable[[int], bool] | None = None,
) -> Path | None:
    """The newest checkpoint that passes ``verify_checkpoint``; None where there is no checkpoint.

    Args:
        warn: told of each damaged checkpoint that is passed over.
        wanted: given the optimizer steps of a checkpoint, whether to look at it at all.

    Raises:
        CheckpointError: there are checkpoints and each of them is damaged.
    """
    reasons = []
    for path in reversed(list_checkpoints(work_dir)):
        if wanted is not None and not wanted(int(_NAME.match(path.name)[1])):
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
            warn(f"checkpoint {path.name} is passed over: {error}")
            continue
        return path
    if reasons:
        raise CheckpointError(
            f"no checkpoint under {checkpoints_dir(work_dir)} is whole: "
            + "; ".join(reasons)
            + ". "
            "Name another one with --resume PATH, or start anew in another --work-dir."
        )
    return None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no half folder can be left."""
    aside = path.parent / f".removing-{path.name}-{os.getpid()}"
    path.rename(aside)
    shutil.rmtree(aside)


@contextmanager
def exclusive_work_dir(work_dir: str | Path) -> Iterator[None]:
    """Hold ``work_dir`` for this run; the lock ends with the process, however that ends.

    Raises:
        CheckpointError: another run holds it.
    """
    import fcntl

    folder = Path(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise CheckpointError(
                f"work_dir {folder} is being written by another run ({owner}). "
                "Wait for it, stop it, or choose another --work-dir."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _publish(aside: Path, target: Path) -> None:
    replaced = None
    if target.exists():  # a resume from an older step comes past this step again
        number = 1
        while (replaced := target.with_name(f"{target.name}.replaced-{number}")).exists():
            number += 1
        target.rename(replaced)
    aside.rename(target)
    _flush_directory(target.parent)
    if replaced is not None:
        remove_checkpoint(replaced)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written; the work_dir is ours alone (see the lock)."""
    for path in folder.glob(".*-iter_*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "digest": _digest(files, FORMAT_VERSION),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _digest(files: dict, version: int) -> str:
    return hashlib.sha256(json.dumps([version, files], sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(path)
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_no_space(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return "No space left on device" in str(error)  # safetensors wraps the system's error as text
