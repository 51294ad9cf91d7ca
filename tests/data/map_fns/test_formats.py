"""Each map function by hand, and the recognition of formats."""

import ast
import inspect

import pytest

from xtuner_lite.data.map_fns.recognise import FORMATS, format_of, recognise
from xtuner_lite.data.messages import BadRow, check_messages
from xtuner_lite.registry import MAP_FNS


def call(name, row):
    return MAP_FNS.get(name)(row)


def test_openai():
    row = {"messages": [{"role": "developer", "content": "s"},
                        {"role": "assistant", "content": "a", "weight": 0}]}  # fmt: skip
    mapped = call("openai", row)
    assert [m["role"] for m in mapped["messages"]] == ["system", "assistant"]
    assert mapped["messages"][1]["loss"] == 0
    with pytest.raises(BadRow, match="no list under 'messages'; keys found: text"):
        call("openai", {"text": "a"})


def test_sharegpt_with_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "w", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "system": "Be brief.",
        "tools": "[]",
    }
    mapped = call("sharegpt", row)
    messages = check_messages(mapped["messages"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "w", "arguments": {"city": "Bonn"}}
    assert mapped["tools"] == "[]"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "alien", "value": "a"}, "turn 0: from is 'alien'; allowed: human"),
        ({"from": None, "value": "a"}, "turn 0: from is None"),
        ({"value": "a"}, "turn 0 has no 'from' and 'value'"),
        ({"from": "function_call", "value": "{"}, "turn 0: function_call: not valid JSON"),
    ],
)
def test_bad_sharegpt_turns(turn, reason):
    with pytest.raises(BadRow, match=reason):
        call("sharegpt", {"conversations": [turn]})


def test_alpaca():
    row = {"instruction": "Translate.", "input": "cheese", "output": "fromage",
           "history": [["a", "b"]], "system": "s"}  # fmt: skip
    assert call("alpaca", row)["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Translate.\ncheese"},
        {"role": "assistant", "content": "fromage"},
    ]
    row = {"instruction": "Hi", "input": "", "output": "Hello"}
    assert call("alpaca", row)["messages"][0]["content"] == "Hi"
    with pytest.raises(BadRow, match="'output' is missing; keys found: instruction"):
        call("alpaca", {"instruction": "a"})
    with pytest.raises(BadRow, match="'instruction' is 3, not text"):
        call("alpaca", {"instruction": 3, "output": "a"})
    with pytest.raises(BadRow, match=r"'history' holds 'a', not \[question, answer\]"):
        call("alpaca", {**row, "history": ["a"]})


def test_pretrain_and_prompt_completion():
    assert call("pretrain", {"text": "a", "url": "u"}) == {"text": "a"}
    with pytest.raises(BadRow, match="'text' is None, not text"):
        call("pretrain", {"text": None})
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}
    assert [m["content"] for m in call("prompt_completion", row)["messages"]] == ["q", "a"]
    with pytest.raises(BadRow, match="'completion' is missing"):
        call("prompt_completion", {"prompt": "q"})


def test_every_map_function_documents_an_example_row_that_it_takes():
    names = sorted(name for name, entry in MAP_FNS.entries().items() if "map_fns" in entry.module)
    assert names[:5] == ["alpaca", "openai", "pretrain", "prompt_completion", "sharegpt"]
    for name in names:
        doc = inspect.getdoc(MAP_FNS.get(name))
        example = ast.literal_eval(doc.split("Example row::")[1].strip())
        row = {key: value for key, value in example.items() if "optional" not in str(value)}
        assert recognise([row], "x")[0] == name
        mapped = call(name, row)
        assert "text" in mapped or check_messages(mapped["messages"])


def test_recognise_says_which_and_why():
    rows = [{"instruction": "a", "output": "b"}] * 3 + [{"nothing": 1}]
    name, why = recognise(rows, "my.json")
    assert name == "alpaca"
    assert why == (
        "my.json: recognised as 'alpaca': 3 of the first 4 rows have 'instruction' and 'output'"
    )


def test_formats_are_tried_in_order():
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert format_of(chat) == "openai"
    assert format_of({**chat, "label": True}) == "unpaired labels"
    assert format_of({"prompt": "a", "chosen": "b", "rejected": "c"}) == "preference pairs"
    assert format_of({"messages": []}) is None
    assert format_of("a") is None
    assert all(f.map_fn in MAP_FNS for f in FORMATS.values() if f.map_fn)


def test_mixed_and_unknown_rows_show_keys_and_formats():
    with pytest.raises(
        ValueError, match=r"no known format.*\n.*\[q, a\] in 2 rows\n.*alpaca \('in"
    ):
        recognise([{"q": 1, "a": 2}] * 2, "x.json")
    with pytest.raises(ValueError, match="several formats at once.*1 x alpaca.* 1 x pretrain"):
        recognise([{"instruction": "a", "output": "b"}, {"text": "a"}], "x.json")
    with pytest.raises(ValueError, match=r"preference pairs.*preference training \(DPO\)"):
        recognise([{"chosen": 1, "rejected": 2}], "x.json")
