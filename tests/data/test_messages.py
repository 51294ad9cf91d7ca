"""The message schema and its reasons."""

import pytest

from xtuner_lite.data.messages import BadRow, UnusableRow, check_messages, check_tools

USER = {"role": "user", "content": "Hi"}


def test_good_messages_come_back_unchanged():
    chat = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "é"}]
    assert check_messages(chat) == chat
    assert check_messages([USER, USER]) == [USER, USER]  # alternation is the template's business


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"


def test_tool_calls_get_the_form_templates_expect():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["content"] == ""
    assert message["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    ]


def test_bare_tool_schemas_are_wrapped():
    schema = {"name": "f", "parameters": {}}
    wrapped = [{"type": "function", "function": schema}]
    assert check_tools('[{"name": "f", "parameters": {}}]') == wrapped
    assert check_tools(wrapped) == wrapped
    assert check_tools("") is None
    assert check_tools("[]") is None


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hi", "messages is 'Hi', not a list"),
        (["Hi"], "message 0 is 'Hi', not an object"),
        ([{"role": "bot", "content": "a"}], "message 0: role is 'bot'; allowed: system, user"),
        ([{"role": ["user"], "content": "a"}], r"message 0: role is \['user'\]"),
        ([USER, {"role": "user"}], "message 1: content is None"),
        ([{"role": "user", "content": 5}], "message 0: content is 5"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'image' is not text; images need"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text part's text is None"),
        ([{"role": "user", "content": "a\ud800"}], r"lone surrogate \(U\+D800\) at character 1"),
        ([{**USER, "loss": "no"}], "loss is 'no'; allowed: true, false or a weight"),
        ([{**USER, "loss": -1}], "loss is -1"),
        ([{**USER, "loss": float("nan")}], "loss is nan"),
        ([{**USER, "reasoning_content": 5}], "reasoning_content is 5, not text"),
        ([{**USER, "name": "\udc00"}], "name holds a lone surrogate"),
        ([{**USER, "tool_calls": [{}]}], "tool_calls in a user message"),
        ([{"role": "assistant", "tool_calls": [{}]}], "has no function name"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "arguments of 'f': not valid JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            r"arguments of 'f' are \[1\], not an object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1}}}]}],
            "not plain JSON data",
        ),
    ],
)
def test_bad_messages(messages, reason):
    with pytest.raises(BadRow, match=reason):
        check_messages(messages)


def test_bad_tools():
    with pytest.raises(BadRow, match="tools: not valid JSON"):
        check_tools("[")
    with pytest.raises(BadRow, match="not a list of function schemas"):
        check_tools('{"name": "f"}')
    with pytest.raises(BadRow, match="has no function name"):
        check_tools([{"type": "function"}])


def test_rows_that_teach_nothing_are_unusable_not_bad():
    with pytest.raises(UnusableRow, match="conversation is empty"):
        check_messages([])
    empty = {"role": "assistant", "content": " \n"}
    with pytest.raises(UnusableRow, match=r"an assistant message is empty \(message 1\)"):
        check_messages([USER, empty])
    assert check_messages([USER, {**empty, "loss": False}])  # it is not learnt: no harm


def test_image_parts_where_they_are_allowed():
    parts = [
        {"type": "image_url", "image_url": {"url": "http://x/a.jpg"}},
        "What ",
        {"type": "text", "text": "is it?"},
        {"type": "image", "path": "b.jpg"},
    ]
    (message,) = check_messages([{"role": "user", "content": parts}], images=True)
    assert message["content"] == [
        {"type": "image", "image": "http://x/a.jpg"},
        {"type": "text", "text": "What "},
        {"type": "text", "text": "is it?"},
        {"type": "image", "image": "b.jpg"},
    ]
    texts = [{"type": "text", "text": "a"}]
    assert check_messages([{"role": "user", "content": texts}], images=True)[0]["content"] == "a"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "names no image; allowed"),
        ({"role": "user", "content": [{"type": "image", "image": 5}]}, "names no image"),
        ({"role": "assistant", "content": [{"type": "image", "image": "a"}]}, "it writes text"),
        ({"role": "user", "content": [{"type": "image", "image": "\ud800"}]}, "lone surrogate"),
        ({"role": "user", "content": [{"type": "image", "image": "a"}, 5]}, "part 5 is not text"),
    ],
)
def test_bad_image_parts(message, reason):
    with pytest.raises(BadRow, match=reason):
        check_messages([message], images=True)
