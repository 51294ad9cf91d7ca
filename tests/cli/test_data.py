"""xtuner-lite data diff, xtuner-lite data at-step."""

import pytest

from tests.cli.conftest import write_rows
from tests.end_to_end.conftest import conversations
from xtuner_lite.cli.main import main


def test_diff_of_equal_data(project, capsys):
    (project / "b.py").write_text(
        (project / "cfg.py").read_text() + "train_cfg.update(max_epochs=5)"
    )
    assert main(["data", "diff", "cfg.py", "b.py"]) == 0
    text = capsys.readouterr().out
    assert "rows equal                  20\n" in text
    assert "differ" not in text


def test_diff_shows_what_changed(project, capsys):
    rows = conversations()
    rows[7]["messages"][1]["content"] = "It is nine!"
    write_rows(project / "other.json", rows)
    text = (project / "cfg.py").read_text()
    (project / "b.py").write_text(text + 'train_dataloader["dataset"].update(train_on="all")\n')
    assert main(["data", "diff", "cfg.py", "b.py", "-n", "1"]) == 1
    shown = capsys.readouterr().out
    assert "labels differ               20\n" in shown
    assert "labels differ: data.json:2\n" in shown
    assert "... labels differ: 19 more row(s)" in shown
    (project / "c.py").write_text(text.replace("'data.json'", "'other.json'"))
    assert main(["data", "diff", "cfg.py", "c.py"]) == 1
    shown = capsys.readouterr().out
    assert "only in A: data.json:2\n" in shown
    assert "No row is in both: rows are known by 'file:line'" in shown


def test_diff_around_the_first_difference(project, capsys):
    (project / "fn.py").write_text(
        "from xtuner_lite.registry import MAP_FNS\n\n"
        '@MAP_FNS.register_module(name="shouted")\n'
        "def shouted(row):\n"
        '    """OpenAI rows, every answer in capitals."""\n'
        "    question, answer = row['messages']\n"
        "    return {'messages': [question, {**answer, 'content': answer['content'].upper()}]}\n"
    )
    change = 'train_dataloader["dataset"].update(map_fn="shouted")\n'
    (project / "b.py").write_text((project / "cfg.py").read_text() + change)
    assert main(["data", "diff", "cfg.py", "b.py", "-n", "1", "--plugin", "fn.py"]) == 1
    text = capsys.readouterr().out
    assert "tokens differ: data.json:2\n" in text
    assert "[[It is 2. <|im_end|>]]" in text
    assert "[[IT IS 2. <|im_end|>]]" in text


def test_at_step_names_the_rows_training_sees(project, capsys):
    from xtuner_lite.config import load_config
    from xtuner_lite.runner.runner import Runner

    seen = []
    cfg = load_config("cfg.py", overrides=["log_level='WARNING'"])
    runner = Runner.from_cfg(cfg)
    loader = runner.prepare_data()
    for step in loader.steps(0, 2 * len(loader)):
        seen.append([row for batch in step for rows in batch["row_ids"] for row in rows])
    for number in (1, len(loader), len(loader) + 1):
        assert main(["data", "at-step", "cfg.py", str(number)]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split()[0] for line in lines if line.startswith("    data.json:")]
        assert rows == seen[number - 1]
    assert f"step {len(loader) + 1}: epoch 2, step 1 of {len(loader)} in it; 1 sample(s)" in lines


def test_at_step_with_tokens(project, capsys):
    assert main(["data", "at-step", "cfg.py", "1", "--preview"]) == 0
    assert "[[It is" in capsys.readouterr().out
    assert main(["data", "at-step", "cfg.py", "0"]) == 1
    assert "step 0: steps are counted from 1, as in the log" in capsys.readouterr().err


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["data"])
    assert "the following arguments are required: ACTION" in capsys.readouterr().err
