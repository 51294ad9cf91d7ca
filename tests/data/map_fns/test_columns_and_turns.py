"""Map functions of one question a row, of one text, of ReAct and of preference, by hand."""

import pytest

from xtuner_lite.data.messages import BadRow, UnusableRow, check_messages
from xtuner_lite.registry import MAP_FNS


def call(name, row, **options):
    return MAP_FNS.get(name)(row, **options)


def pairs(mapped) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in mapped["messages"]]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("default", {"input": "q", "output": "a"}, ("q", "a")),
        ("alpaca_zh", {"instruction_zh": "q", "input_zh": "x", "output_zh": "a"}, ("q\nx", "a")),
        ("alpaca_zh", {"instruction_zh": "q", "input_zh": None, "output_zh": "a"}, ("q", "a")),
        ("question_answer", {"question": "q", "answer": "a"}, ("q", "a")),
        ("question_answer", {"prompt": "q", "response": "a"}, ("q", "a")),
        ("stack_exchange", {"question": "q", "response": "a", "qid": 1}, ("q", "a")),
        ("openorca", {"system_prompt": "", "question": "q", "response": "a"}, ("q", "a")),
    ],
)
def test_one_question_and_its_answer(name, row, expected):
    assert pairs(call(name, row)) == [("user", expected[0]), ("assistant", expected[1])]


def test_columns_of_subjects():
    sql = call("sql", {"context": "CREATE TABLE t (a INT)", "question": "q", "answer": "SELECT a"})
    assert pairs(sql)[1:] == [("user", "CREATE TABLE t (a INT)\nq"), ("assistant", "SELECT a")]
    row = {"system_prompt": "s", "question": "q", "response": "a"}
    assert pairs(call("openorca", row))[0] == ("system", "s")
    for name, row in [
        ("arxiv", {"abstract": "q", "title": "a"}),
        ("colors", {"description": "q", "color": "a"}),
        ("code_alpaca", {"prompt": "q", "completion": "a"}),
        ("tiny_codes", {"prompt": "q", "response": "a"}),
        ("crime_kg_assitant", {"input": "q", "output": "a"}),
        ("law_reference", {"question": "q", "answer": "a"}),
        ("medical", {"instruction": "q", "input": "", "output": "a"}),
    ]:
        assert pairs(call(name, row))[1:] == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("default", {"input": "q"}, "'output' is missing; keys found: input"),
        ("arxiv", {"abstract": 3, "title": "a"}, "'abstract' is 3, not text"),
        (
            "openorca",
            {"system_prompt": 5, "question": "q", "response": "a"},
            "'system_prompt' is 5",
        ),
        ("oasst1", {"text": "Hello"}, "'text' does not start with '### Human:': 'Hello'"),
        ("moss", {"chat": []}, "no turns under 'chat'; keys found: chat"),
        ("moss", {"chat": {"turn_2": {}}}, "'chat' has no 'turn_1'; keys found: turn_2"),
        ("moss", {"chat": {"turn_1": {"Human": "a"}}}, "turn_1: 'MOSS' is None, not text"),
        ("msagent_react", {"conversations": "{"}, "is text, but not of a list"),
        ("msagent_react", {"conversations": [{"from": "x", "value": "a"}]}, "turn 0 has no 'from'"),
        (
            "msagent_react",
            {"conversations": [{"from": "assistant", "value": "<|startofthink|>{<|endofthink|>"}]},
            "turn 0: the API call is not valid JSON",
        ),
        ("chosen", {"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        (
            "chosen",
            {"chosen": "a", "rejected": "b"},
            "no prompt, neither beside 'chosen' nor in it",
        ),
        (
            "chosen",
            {"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
            "'chosen' does not end with an answer",
        ),
        ("chosen", {"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt' is 5, not text"),
        ("unpaired", {"prompt": "q", "completion": "a", "label": 1}, "'label' is 1, not true"),
        ("llava", {"conversations": [{"from": "human", "value": "<image>"}]}, "1 x <image> in the"),
        (
            "llava_image_only",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "message 0: no <image> in a question",
        ),
    ],
)
def test_bad_rows(name, row, reason):
    with pytest.raises(BadRow, match=reason):
        call(name, row)


def test_oasst1_splits_turns_and_keeps_lists():
    text = (
        "### Human: Name two.### Assistant: 1. a\n### b\n2. c\n### Human: Thanks\n### Assistant: :)"
    )
    assert pairs(call("oasst1", {"text": text})) == [
        ("user", "Name two."),
        ("assistant", "1. a\n### b\n2. c"),
        ("user", "Thanks"),
        ("assistant", ":)"),
    ]


MOSS_TURN = {
    "Human": "<|Human|>: a None?<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
    "Commands": "<|Commands|>: None<eoc>\n",
    "Tool Responses": "<|Results|>: None<eor>\n",
    "MOSS": "<|MOSS|>: None<eom>\n",
}


def test_moss_without_plug_ins():
    mapped = call("moss", {"meta_instruction": "Be kind.", "chat": {"turn_1": MOSS_TURN}})
    assert pairs(mapped) == [("system", "Be kind."), ("user", "a None?"), ("assistant", "None")]
    assert mapped["tools"] is None
    assert "reasoning_content" not in mapped["messages"][2]


def moss(command, result="<|Results|>:\n42\n<eor>"):
    meta = "- Inner thoughts: enabled.\n- Web search: enabled. API: Search(query)\n- X: disabled."
    turn = {**MOSS_TURN, "Inner Thoughts": "<|Inner Thoughts|>: I think.<eot>",
            "Commands": command, "Tool Responses": result}  # fmt: skip
    return call("moss", {"meta_instruction": meta, "chat": {"turn_1": turn}})


def test_moss_with_plug_ins():
    mapped = moss('<|Commands|>: Search("a (b), c"), Solve("x=1", "x") ,\nSearch(d)<eoc>')
    messages = check_messages(mapped["messages"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["reasoning_content"] == "I think."
    assert [call["function"] for call in messages[2]["tool_calls"]] == [
        {"name": "Search", "arguments": {"query": "a (b), c"}},
        {"name": "Solve", "arguments": {"input": '"x=1", "x"'}},
        {"name": "Search", "arguments": {"query": "d"}},
    ]
    assert messages[3]["content"] == "42"
    assert "reasoning_content" not in messages[4]
    assert mapped["tools"][0]["name"] == "Search"
    assert list(mapped["tools"][0]["parameters"]["properties"]) == ["query"]


@pytest.mark.parametrize("none", ["None", "Non", "None (not needed)"])
def test_moss_without_a_command_thinks_before_its_answer(none):
    messages = moss(f"<|Commands|>: {none}<eoc>", "<|Results|>: None<eor>")["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[2]["reasoning_content"] == "I think."


def test_moss_commands_that_end_with_none():
    (message,) = [m for m in moss('Search("a"), None')["messages"] if m.get("tool_calls")]
    assert len(message["tool_calls"]) == 1


def test_moss_commands_that_cannot_be_read():
    with pytest.raises(BadRow, match="turn_1: the command is not of the form"):
        moss("<|Commands|>: search the web<eoc>")
    with pytest.raises(BadRow, match="turn_1: results without a command: '42'"):
        moss("<|Commands|>: None<eoc>")


def test_msagent_react():
    said = (
        'First. <|startofthink|>```JSON\n{"api_name": "draw", "url": "u", "parameters": '
        '{"a": "猫"}}\n```<|endofthink|>\n\n<|startofexec|>```JSON\n{"image": "c"}\n```'
        '<|endofexec|>\n<|startofthink|>{"api_name": "show"}<|endofthink|>Done.'
    )
    turns = [{"from": "system", "value": "s"}, {"from": "user", "value": "Draw"},
             {"from": "assistant", "value": said}, {"from": "user", "value": "Thanks"},
             {"from": "assistant", "value": "Welcome"}]  # fmt: skip
    expected = [
        ("system", "s"),
        ("user", "Draw"),
        ("assistant", 'Thought: First.\nAction: draw\nAction Input: {"a": "猫"}'),
        ("user", 'Response: {"image": "c"}'),
        ("assistant", "Action: show\nAction Input: {}"),
        ("assistant", "Final Answer: Done."),
        ("user", "Thanks"),
        ("assistant", "Welcome"),
    ]
    assert pairs(call("msagent_react", {"conversations": turns})) == expected
    assert pairs(call("msagent_react", {"conversations": repr(turns)})) == expected


QUESTION = {"role": "user", "content": "q"}
GOOD, WORSE = ({"role": "assistant", "content": text} for text in ("good", "worse"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "worse"},
        {"question": "q", "chosen": "good", "rejected": "worse"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "worse"},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, WORSE]},
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, WORSE]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "worse"},
        },
    ],
)
def test_preference_pairs_in_every_layout(row):
    mapped = call("preference", row)
    assert mapped["chosen"] == [QUESTION, GOOD]
    assert mapped["rejected"] == [QUESTION, WORSE]
    assert call("chosen", row)["messages"] == [QUESTION, GOOD]


def test_only_the_last_answer_of_a_chosen_branch_is_learnt():
    row = {
        "system": "s",
        "messages": [QUESTION, WORSE, QUESTION],
        "chosen": "good",
        "rejected": "x",
    }
    messages = call("chosen", row)["messages"]
    assert [m.get("loss") for m in messages] == [None, None, False, None, None]
    assert messages[0] == {"role": "system", "content": "s"}
    row = {"instruction": "q", "input": "x", "chosen": "good", "rejected": "y"}
    assert call("chosen", row)["messages"][0]["content"] == "q\nx"


def test_labels():
    row = {"messages": [QUESTION, GOOD], "label": True}
    assert call("unpaired", row) == {"messages": [QUESTION, GOOD], "label": True, "tools": None}
    assert call("desirable", row)["messages"] == [QUESTION, GOOD]
    with pytest.raises(UnusableRow, match="the answer is labelled as bad"):
        call("desirable", {**row, "label": False})
    row = {"prompt": "q", "completion": "good", "kto_tag": True}
    assert call("desirable", row)["messages"] == [QUESTION, GOOD]


def test_images_take_the_place_of_their_marks():
    turns = [{"from": "human", "value": "Compare <image> and <image>."},
             {"from": "gpt", "value": "Same."}]  # fmt: skip
    mapped = call("llava", {"images": ["a.jpg", "b.jpg"], "conversations": turns})
    assert mapped["messages"][0]["content"] == [
        {"type": "text", "text": "Compare "},
        {"type": "image", "image": "a.jpg"},
        {"type": "text", "text": " and "},
        {"type": "image", "image": "b.jpg"},
        {"type": "text", "text": "."},
    ]
    mapped = call("llava_image_only", {"images": ["a.jpg", "b.jpg"], "conversations": turns})
    assert [part["image"] for part in mapped["messages"][0]["content"]] == ["a.jpg", "b.jpg"]
    row = {"messages": [{"role": "user", "content": "<image>?"}, GOOD], "images": ["a.jpg"]}
    assert call("openai", row)["messages"][0]["content"][0]["image"] == "a.jpg"
