"""xtuner-lite check-data."""

import json

import pytest

from tests.cli.conftest import write_rows
from tests.end_to_end.conftest import conversations
from xtuner_lite.cli.main import main


def test_the_report(project, capsys):
    rows = conversations(6)
    rows[4] = rows[1]
    rows[5]["messages"][1]["content"] = " "
    write_rows(project / "data.json", rows)
    before = sorted(path.name for path in project.rglob("*"))
    assert main(["check-data", "cfg.py"]) == 0
    text = capsys.readouterr().out
    assert "== train_dataloader\n\ndata.json: what each row teaches\n" in text
    assert "rows read                                           6\n" in text
    assert "tokens of a row: least " in text
    assert "longest rows:\n" in text
    assert "copies of another row (all tokens equal): 1 (" in text
    assert "data.json:6 = data.json:3" in text or "data.json:3 = data.json:6" in text
    assert "1 samples in an optimizer step (batch_size 1 x accumulative_counts 1 x 1 rank" in text
    assert "optimizer steps an epoch" in text
    assert "largest micro-batch: 1 sample(s), 1 x " in text
    assert "KiB of tensors" in text
    assert sorted(path.name for path in project.rglob("*")) == before  # nothing is written


def test_an_empty_answer_is_seen(project, capsys):
    rows = conversations(3)
    rows[1]["messages"][1]["content"] = ""
    write_rows(project / "data.json", rows)
    assert main(["check-data", "cfg.py"]) == 0
    text = capsys.readouterr().out
    assert "an assistant message is empty                     1   33.3%\n" in text
    assert "data.json:3: an assistant message is empty" in text
    assert "rows with an empty answer: 0\n" in text  # none is left among those trained on


def test_validation_rows_that_are_trained_on(project, capsys):
    write_rows(project / "val.json", [*conversations(1), *conversations(30)[28:]])
    with (project / "cfg.py").open("a") as file:
        file.write('val_set = dict(train_set, data="val.json")\n')
        file.write("val_dataloader = dict(batch_size=1, dataset=val_set)\nval_cfg = dict()\n")
    assert main(["check-data", "cfg.py"]) == 0
    text = capsys.readouterr().out
    assert "== val_dataloader\n" in text
    assert (
        "rows of val_dataloader that are training rows too: 1 (33.3%)\n  val.json:2 = data.json:2\n"
    ) in text


def test_a_data_set_of_the_users_own(project, capsys):
    (project / "mine.py").write_text(
        "import numpy as np\n"
        "from xtuner_lite.registry import DATASETS\n\n"
        "@DATASETS.register_module()\n"
        "class CheckedCards:\n"
        '    """Two samples made by hand."""\n'
        "    def __init__(self, size=2): self.size = size\n"
        "    def __len__(self): return self.size\n"
        "    def __getitem__(self, index):\n"
        "        ids = np.array([5, 6 + index, 7])\n"
        "        return dict(input_ids=ids, labels=np.where(ids == 7, ids, -100), lengths=[3],\n"
        '                    row_ids=[f"cards:{index}"])\n'
    )
    with (project / "cfg.py").open("a") as file:
        file.write('train_dataloader["dataset"] = dict(type="CheckedCards")\n')
    code = main(["check-data", "cfg.py", "--plugin", "mine.py"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "tokens of a row: least 3, median 3, mean 3, 95 % within 3, most 3" in text
    assert "learnt tokens of a row: least 1" in text
    assert "2 samples\n" in text


def test_samples_without_tokens(project, capsys):
    with (project / "cfg.py").open("a") as file:
        file.write("from tests.toy import ToyData, toy_collate\n")
        file.write("train_dataloader = dict(batch_size=2, dataset=dict(type=ToyData),\n")
        file.write("                        collate_fn=dict(type=toy_collate))\n")
        file.write("del train_set, data_path, max_length\n")
    code = main(["check-data", "cfg.py"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "ToyData: 12 samples of x, labels, row_ids; without input_ids and labels" in text
    assert "largest micro-batch: 2 sample(s), 40 B of tensors" in text  # 2 x (4 + 1) float32


def test_options_and_refused_configs(project, capsys):
    assert main(["check-data", "cfg.py", "--samples", "1", "--cfg-options", "max_length=64"]) == 0
    text = capsys.readouterr().out
    assert "From here on: the first 1 of " in text
    assert "most 64" not in text or "64 = 64 tokens" in text
    assert main(["check-data", "cfg.py", "--cfg-options", "train_set.max_lenght=3"]) == 2
    assert "did you mean 'max_length'" in capsys.readouterr().err


def test_a_bad_row_is_told_as_in_training(project, capsys):
    rows = conversations(3)
    rows[1]["messages"][1]["role"] = "assistent"
    write_rows(project / "data.json", rows)
    assert main(["check-data", "cfg.py"]) == 1
    assert capsys.readouterr().err.startswith("error: data.json:3: ")


@pytest.mark.parametrize("alias", ["check-custom-dataset"])
def test_the_name_of_xtuner(project, alias, capsys):
    assert main([alias, "cfg.py"]) == 0
    assert "== train_dataloader" in capsys.readouterr().out
    assert json.loads((project / "data.json").read_text())


def test_a_stream(project, capsys):
    with (project / "cfg.py").open("a") as file:
        file.write("from xtuner_lite.data.stream import StreamDataset\n")
        file.write("train_set.update(type=StreamDataset, cache=False)\n")
        file.write("train_dataloader.update(dataset=train_set)\n")
        file.write("train_cfg = dict(max_iters=7)\n")
    assert main(["check-data", "cfg.py", "--samples", "2"]) == 0
    text = capsys.readouterr().out
    assert "From here on: the first 2 samples of a stream" in text
    assert "a stream; 1 samples in an optimizer step, 7 steps" in text
    assert main(["data", "at-step", "cfg.py", "3"]) == 0
    assert "step 3: of a stream; 1 sample(s)\n" in capsys.readouterr().out
    assert main(["preview-data", "cfg.py", "-n", "1"]) == 0
    assert main(["data", "diff", "cfg.py", "cfg.py"]) == 1
    assert "a stream has no end, so not all of it can be looked at" in capsys.readouterr().err
