"""The data contract: what stops a run, and in which words."""

import pytest

from tests.config.pages import write_page
from tests.tiny import tiny_tokenizer
from xtuner_lite.config import check_config, load_config
from xtuner_lite.data.contract import DataContract, DataContractError
from xtuner_lite.data.dataset import ChatDataset, TextDataset
from xtuner_lite.data.ledger import Ledger


def ledger(**counts) -> Ledger:
    """100 rows read; 2 skipped, 10 truncated, 1 without an end; 1,000 tokens, 300 learnt."""
    made = Ledger(name="my.json", rows_read=100)
    for line in (7, 9):
        made.skip("bad row", f"my.json:{line}", "not JSON")
    made.rows_kept, made.rows_truncated, made.tokens_truncated = 98, 10, 50
    made.rows_eos_learnt, made.rows_eos_cut = 88, 9
    made.tokens_encoded, made.tokens = 1050, 1000
    made.supervised_encoded, made.supervised_truncated, made.tokens_supervised = 320, 20, 300
    for name, value in counts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "kept",
    [
        dict(),
        dict(max_skipped=0.02, max_truncated=0.11, min_supervised=0.3),
        dict(max_skipped=2, max_truncated=10, min_supervised=300),
        dict(max_skipped=None, require_tools=True),
    ],
)
def test_contracts_that_are_kept(kept):
    ledger().check()
    DataContract.of(kept).check(ledger())
    DataContract.of(None).check(ledger())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (dict(max_skipped=0.01), r"max_skipped=0.01: 2 of 100 rows \(2.00%\) were skipped "
                                 r"\(2 x bad row, such as my.json:7: not JSON\). Correct"),
        (dict(max_skipped=1), "max_skipped=1: 2 of 100 rows"),
        (dict(max_truncated=0.1), r"max_truncated=0.1: 10 of 98 rows \(10.20%\) were truncated and "
                                  "lost 50 tokens, 20 of them supervised. Raise max_length"),
        (dict(max_truncated=0), "max_truncated=0: 10 of 98 rows"),
        (dict(require_eos=True), r"require_eos=True: in 1 of 98 rows \(1.02%\) a learnt turn has"),
        (dict(min_supervised=0.5), r"min_supervised=0.5: 300 of 1,000 tokens \(30.00%\) are sup"),
        (dict(min_supervised=301), "min_supervised=301: 300 of 1,000 tokens"),
    ],
)  # fmt: skip
def test_contracts_that_are_broken(broken, message):
    with pytest.raises(DataContractError, match=message):
        DataContract.of(broken).check(ledger())


def test_every_breach_is_told_at_once():
    with pytest.raises(DataContractError) as caught:
        DataContract(max_skipped=0.0, max_truncated=0.0, require_eos=True).check(ledger())
    text = str(caught.value)
    assert text.startswith("my.json breaks the data_contract of the config:\n")
    assert [line.split("=")[0].strip() for line in text.splitlines()[1:]] == [
        "max_skipped", "max_truncated", "require_eos",
    ]  # fmt: skip


def test_tools_that_the_template_does_not_write():
    found = ledger(rows_with_tools=4, rows_tools_unwritten=4)
    with pytest.raises(DataContractError, match="the tools of 4 of 4 rows .* that offer some"):
        DataContract(require_tools=True).check(found)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(max_skiped=0.1), ValueError, "no key 'max_skiped'; did you mean 'max_skipped'"),
        (dict(max_skipped="1%"), TypeError, "max_skipped='1%'; allowed: a float from 0 to 1"),
        (dict(max_skipped=True), TypeError, "max_skipped=True; allowed"),
        (dict(max_skipped=1.5), ValueError, "max_skipped=1.5 is out of range"),
        (dict(min_supervised=-1), ValueError, "min_supervised=-1 is out of range"),
        (dict(max_truncated=float("nan")), ValueError, "max_truncated=nan is out of range"),
        (dict(require_eos=1), TypeError, "require_eos=1; allowed: True or False"),
        (0.1, TypeError, "data_contract=0.1; allowed: a dict such as"),
    ],
)
def test_wrong_contracts(given, error, message):
    with pytest.raises(error, match=message):
        DataContract.of(given)


def test_a_data_set_holds_to_its_contract():
    rows = [{"instruction": "a", "output": "b " * n} for n in (1, 2, 60)]
    options = dict(tokenizer=tiny_tokenizer(), max_length=32)
    ChatDataset(rows, data_contract=dict(max_truncated=1, require_eos=True), **options)
    with pytest.raises(DataContractError, match=r"max_truncated=0: 1 of 3 rows \(33.33%\)"):
        ChatDataset(rows, data_contract=dict(max_truncated=0), **options)
    with pytest.raises(DataContractError, match="max_skipped=0: 1 of 2 rows"):
        TextDataset([{"text": "a b"}, {"text": ""}], data_contract=dict(max_skipped=0), **options)


def test_a_template_without_an_end_token_breaks_require_eos():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rows = [{"instruction": "a", "output": "b"}]
    with pytest.raises(
        DataContractError, match="in 1 of 1 rows .* a learnt turn has no learnt end"
    ):
        ChatDataset(rows, tokenizer=tokenizer, data_contract=dict(require_eos=True))


def test_tools_are_counted():
    schema = {"type": "function", "function": {"name": "f", "parameters": {}}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [row, {**row, "tools": [schema]}]
    dataset = ChatDataset(rows, tokenizer=tiny_tokenizer())
    assert (dataset.ledger.rows_with_tools, dataset.ledger.rows_tools_unwritten) == (1, 1)
    assert "not written by the template!" in dataset.ledger.report()
    written = ChatDataset(rows, tokenizer=tiny_tokenizer(), template="chatml")
    assert (written.ledger.rows_with_tools, written.ledger.rows_tools_unwritten) == (1, 0)


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        ("dict(max_skipped=0.01, require_eos=True)", None),
        ("dict(max_skiped=0.01)", "no option 'max_skiped'; did you mean 'max_skipped'"),
        ("dict(require_eos='yes')", "got 'yes' .str.; allowed: bool"),
    ],
)
def test_a_wrong_contract_is_told_before_anything_is_loaded(tmp_path, contract, message):
    new = f"max_length=max_length,\n        data_contract={contract},"
    page = write_page(tmp_path, ("max_length=max_length,", new))
    problems = [str(problem) for problem in check_config(load_config(page))]
    assert len(problems) == (message is not None)
    for problem in problems:
        pytest.raises(ValueError, _raise, problem).match(message)


def _raise(text):
    raise ValueError(text)
