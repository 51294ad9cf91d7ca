"""Checkpoint folders: whole or absent, damage is found and named, a work_dir has one writer."""

import errno
import subprocess
import sys

import pytest

from xtuner_lite.engine.checkpoint import (
    MANIFEST,
    CheckpointError,
    exclusive_work_dir,
    list_checkpoints,
    newest_valid_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)


def save(work_dir, step, text="weights"):
    def write(folder):
        (folder / "model.bin").write_text(text)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "meta.json").write_text("{}")

    return write_checkpoint(work_dir / "checkpoints" / f"iter_{step}", write)


def test_checkpoints_are_listed_by_step(tmp_path):
    for step in (100, 20, 3):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iter_3", "iter_20", "iter_100"]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "model.bin").write_text("weightz"),
            r"model.bin was changed after it was written",
        ),
        (lambda p: (p / "model.bin").write_text("weigh"), r"model.bin has 5 bytes, 7 were written"),
        (lambda p: (p / "trainer" / "meta.json").unlink(), r"meta.json is missing"),
        (lambda p: (p / MANIFEST).unlink(), r"manifest.json is missing"),
        (lambda p: (p / MANIFEST).write_text("{"), r"manifest.json is damaged"),
        (
            lambda p: (p / MANIFEST).write_text(
                (p / MANIFEST).read_text().replace('"size": 2', '"size": 3')
            ),
            r"manifest.json is damaged: its own digest",
        ),
    ],
)
def test_damage_is_found_and_the_older_checkpoint_used(tmp_path, damage, message):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    verify_checkpoint(newest)
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(newest)
    told = []
    assert newest_valid_checkpoint(tmp_path, told.append) == older
    assert len(told) == 1
    assert "iter_2 is passed over" in told[0]


def test_all_damaged_is_an_error_none_at_all_is_not(tmp_path):
    assert newest_valid_checkpoint(tmp_path, print) is None
    (save(tmp_path, 1) / "model.bin").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint under .* is whole"):
        newest_valid_checkpoint(tmp_path, lambda text: None)


def test_a_failed_write_leaves_nothing_and_touches_nothing(tmp_path):
    save(tmp_path, 1)

    def write(folder):
        (folder / "model.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        CheckpointError, match="no space left on the disk .* Older checkpoints are whole"
    ):
        write_checkpoint(tmp_path / "checkpoints" / "iter_2", write)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["iter_1"]


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    leftover = tmp_path / "checkpoints" / ".writing-iter_5-123"
    leftover.mkdir(parents=True)
    save(tmp_path, 6)
    assert not leftover.exists()


def test_the_same_step_again_replaces_the_old_folder(tmp_path):
    save(tmp_path, 1, "old")
    path = save(tmp_path, 1, "new")
    assert (path / "model.bin").read_text() == "new"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iter_1"]


def test_removing(tmp_path):
    path = save(tmp_path, 1)
    remove_checkpoint(path)
    assert not list(path.parent.iterdir())


def test_a_work_dir_has_one_writer(tmp_path):
    code = (
        "import sys\nfrom xtuner_lite.engine.checkpoint import exclusive_work_dir\n"
        "with exclusive_work_dir(sys.argv[1]): pass"
    )
    with exclusive_work_dir(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
    assert other.returncode == 1
    assert "is being written by another run (process" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
