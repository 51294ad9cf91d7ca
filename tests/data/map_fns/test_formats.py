"""Each map function by hand, and the recognition of formats."""

import ast
import inspect

import pytest

from xtuner_lite.data.map_fns.recognise import FORMATS, format_of, recognise
from xtuner_lite.data.messages import BadRow, check_messages, check_tools
from xtuner_lite.registry import MAP_FNS, describe


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


XTUNER_NAMES = [
    "alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitant", "default",
    "law_reference", "llava", "llava_image_only", "medical", "msagent_react", "oasst1", "openai",
    "openorca", "pretrain", "sql", "stack_exchange", "tiny_codes", "wizardlm",
]  # fmt: skip
OUR_NAMES = [
    "chosen", "desirable", "moss", "preference", "prompt_completion", "question_answer",
    "sharegpt", "unpaired",
]  # fmt: skip


def example_of(name: str) -> dict:
    """The row in a map function's docstring; values that say 'optional' are left out."""
    example = ast.literal_eval(inspect.getdoc(MAP_FNS.get(name)).split("Example row::")[1].strip())
    return {key: value for key, value in example.items() if "optional" not in str(value)}


def test_every_name_is_registered_and_described():
    ours = {name for name, entry in MAP_FNS.entries().items() if ".map_fns." in entry.module}
    assert ours == set(XTUNER_NAMES + OUR_NAMES)
    assert all(text for name, _, text in describe(MAP_FNS) if name in ours)


@pytest.mark.parametrize("name", XTUNER_NAMES + OUR_NAMES)
def test_every_map_function_documents_an_example_row_that_it_takes(name):
    mapped = call(name, example_of(name))
    if "text" in mapped:
        assert mapped["text"]
    elif name == "preference":
        assert check_messages(mapped["chosen"])[:-1] == check_messages(mapped["rejected"])[:-1]
        assert mapped["chosen"][-1] != mapped["rejected"][-1]
    else:
        roles = [m["role"] for m in check_messages(mapped["messages"], images="llava" in name)]
        assert roles[-1] == "assistant"
        check_tools(mapped.get("tools"))


@pytest.mark.parametrize(
    ("name", "read_as"),
    [(format_.map_fn, format_.map_fn) for format_ in FORMATS.values()]
    + [("preference", "chosen"), ("unpaired", "desirable"), ("code_alpaca", "prompt_completion"),
       ("medical", "alpaca"), ("tiny_codes", "question_answer"),
       ("law_reference", "question_answer"),
       ("crime_kg_assitant", "default"), ("llava_image_only", "llava")],
)  # fmt: skip
def test_example_rows_are_recognised(name, read_as):
    assert recognise([example_of(name)], "x").map_fn == read_as


@pytest.mark.parametrize("name", ["arxiv", "colors", "sql", "msagent_react"])
def test_formats_that_must_be_named(name):
    with pytest.raises(ValueError, match="no known format"):
        recognise([example_of(name)], "x")


@pytest.mark.parametrize("name", ["sql", "medical", "arxiv", "law_reference", "tiny_codes"])
def test_a_subjects_system_prompt_can_be_changed_or_left_out(name):
    row = example_of(name)
    first = call(name, row)["messages"][0]
    assert first["role"] == "system"
    assert len(first["content"]) > 40
    assert MAP_FNS.get(name)(row, system="Mine.")["messages"][0]["content"] == "Mine."
    assert MAP_FNS.get(name)(row, system=None)["messages"][0]["role"] == "user"


def test_recognise_says_which_and_why():
    rows = [{"instruction": "a", "output": "b"}] * 3 + [{"nothing": 1}]
    name, why, _ = recognise(rows, "my.json")
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
    assert format_of({"question": "q", "answer": "a", "context": "c"}) is None
    assert all(f.map_fn in MAP_FNS for f in FORMATS.values())


def test_mixed_and_unknown_rows_show_keys_and_formats():
    with pytest.raises(
        ValueError, match=r"no known format.*\n.*\[q, a\] in 2 rows\n.*alpaca \('in"
    ):
        recognise([{"q": 1, "a": 2}] * 2, "x.json")
    with pytest.raises(ValueError, match="several formats at once.*1 x alpaca.* 1 x pretrain"):
        recognise([{"instruction": "a", "output": "b"}, {"text": "a"}], "x.json")


def test_compared_and_judged_answers_come_with_a_warning():
    name, why, warning = recognise([{"prompt": "a", "chosen": "b", "rejected": "c"}], "x.json")
    assert name == "chosen"
    assert why.endswith("have 'chosen' and 'rejected'; read with map_fn='chosen'")
    assert "learns the CHOSEN answers and never sees the rejected" in warning
    row = {"prompt": "a", "completion": "b", "label": False}
    assert "SKIPS the rows labelled false" in recognise([row], "x.json").warning
    assert recognise([{"text": "a"}], "x.json").warning == ""
