"""Tool calls are read in the form in which the chat template writes them."""

import json

import openai
import pytest

from tests.chat.serving import serving
from tests.templates.official import _FOLDER
from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.chat.server.tool_calls import CallForm, CallWatch, ToolCall, call_form, read_calls
from xtuner_lite.models.sampling import ReplyStats
from xtuner_lite.templates import ChatTemplate, apply_template

HERMES = CallForm("<tool_call>", "</tool_call>", "name", "arguments")
BARE = CallForm("", "", "name", "parameters")
NAMED = CallForm("", "")
LIST = CallForm("[", "]", "name", "arguments")  # [TOOL_CALLS] is special: a reply does not show it

# As Llama 3.1 and Mistral write calls.
LLAMA3_1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    '{% set f = m.tool_calls[0].function %}{{ \'{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '<|im_start|>[' }}{% for c in m.tool_calls %}"
    "{% set out = c.function | tojson %}{{ out[:-1] + ', \"id\": \"' + c.id + '\"}' }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}{{ ']<|im_end|>' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def form_of(template):
    tokenizer = tiny_tokenizer()
    tokens = ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>"]
    if template == "glm4":
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if "{" in template:
        tokenizer.chat_template = template
    else:
        apply_template(tokenizer, template)
    return call_form(ChatTemplate(tokenizer))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("chatml", HERMES),
        ("qwen3", HERMES),  # an empty thought stands before each call
        ((_FOLDER / "qwen2_5.jinja").read_text(encoding="utf-8"), HERMES),
        ((_FOLDER / "qwen3.jinja").read_text(encoding="utf-8"), HERMES),
        ("glm4", NAMED),
        (LLAMA3_1, BARE),
        (MISTRAL, LIST),
        ("zephyr", None),
    ],
)
def test_the_form_is_the_templates(template, form):
    assert form_of(template) == form


CALLS = [
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'),
    (HERMES, '<tool_call>{"arguments":{"x":1},"name":"add"}</tool_call>\n'),
    (HERMES, '<tool_call>\n{"name": "add", "arguments": "{\\"x\\": 1}"}'),  # text; end cut off
    (BARE, '{"name": "add", "parameters": {"x": 1}}'),
    (NAMED, 'add\n{"x": 1}'),
    (LIST, '[{"name": "add", "arguments": {"x": 1}, "id": "abc"}]'),
]


@pytest.mark.parametrize(("form", "text"), CALLS)
def test_one_call(form, text):
    assert read_calls(text, form, ["add"]) == ("", [ToolCall("add", '{"x": 1}')])


def test_text_beside_calls_and_several_calls():
    text = (
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n'
        '{"name": "é", "arguments": {}}\n</tool_call>'
    )
    calls = [ToolCall("add", '{"x": 1}'), ToolCall("é", "{}")]
    assert read_calls(text, HERMES, ["add"]) == ("I add.", calls)
    assert read_calls(text + "\nDone.", HERMES, []) == ("I add.\nDone.", calls)
    text = '[{"name": "add", "arguments": {"x": 1}}, {"name": "é", "arguments": {}}]'
    assert read_calls(text, LIST, []) == ("", calls)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "add it yourself"),
        (HERMES, '<tool_call>\n{"name": "add", "argum'),
        (HERMES, '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>'),
        (HERMES, "<tool_call>" + "[" * 100_000),
        (BARE, '{"name": "Ada", "parameters": {}}'),  # an answer in JSON, no call: unknown name
        (BARE, '{"x": 1}'),
        (NAMED, "add"),
        (NAMED, "add two numbers {1}"),
        (NAMED, 'add\n{"x": 1} and more'),
        (NAMED, 'other\n{"x": 1}'),
        (LIST, "[1, 2]"),
    ],
)
def test_what_is_no_call_stays_text(form, text):
    assert read_calls(text, form, ["add"]) == (text, [])


@pytest.mark.parametrize(("form", "call"), CALLS)
@pytest.mark.parametrize("before", ["", "Well,\n", "a < b \n\n"])
def test_a_stream_shows_nothing_of_a_call(form, call, before):
    if not form.opener:  # the call is the whole reply
        before = ""
    for size in (1, 3, 1000):
        watch = CallWatch(form, ["add"])
        text = before + call
        shown = "".join(watch.push(text[at : at + size]) for at in range(0, len(text), size))
        rest, calls = watch.finish()
        assert (shown, rest) == (before.rstrip(), "")
        assert calls == [ToolCall("add", '{"x": 1}')]


@pytest.mark.parametrize("form", [HERMES, BARE, NAMED, LIST])
@pytest.mark.parametrize("text", ["Hello there", "  a < b\n", "adding", "{1}", "<tool", "addle\n{"])
def test_a_stream_of_text_is_whole(form, text):
    watch = CallWatch(form, ["add"])
    shown = "".join(map(watch.push, text))
    rest, calls = watch.finish()
    assert (shown + rest, calls) == (text, [])


def test_text_is_shown_as_soon_as_it_cannot_be_a_call():
    watch = CallWatch(NAMED, ["add"])
    assert [watch.push(piece) for piece in ("a", "n", " apple")] == ["", "an", " apple"]
    watch = CallWatch(HERMES, ["add"])
    assert [watch.push(piece) for piece in ("a ", "<to", "e>")] == ["a", "", " <toe>"]


# ------------------------------------------------------------------------ through the server

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds",
          "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}}]  # fmt: skip
USER = [{"role": "user", "content": "Add one"}]


@pytest.fixture(scope="module")
def server():
    """A server whose replies the test says; the template is ChatML with tools."""
    tokenizer = apply_template(tiny_tokenizer(), "chatml")
    model = tiny_llama(max_position_embeddings=4096).eval()
    with serving(model, tokenizer) as running:
        yield running


@pytest.fixture
def says(monkeypatch):
    """Makes the model say a text, and keeps what it was asked."""
    asked = {}

    def set_reply(text):
        def generate_reply(model, tokenizer, messages, *, stats: ReplyStats, on_text, **options):
            asked.update(options, messages=messages)
            list(map(on_text, text))
            stats.finish_reason = "stop"

        monkeypatch.setattr("xtuner_lite.chat.server.replies.generate_reply", generate_reply)
        return asked

    return set_reply


TWO = (
    'Adding.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n'
    '{"name": "add", "arguments": {"x": 2}}\n</tool_call>'
)


def test_calls_of_a_whole_answer_and_the_way_back(server, says):
    asked = says(TWO)
    (choice,) = server.create(USER, tools=TOOLS).choices
    assert asked["tools"] == TOOLS
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Adding."
    calls = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("add", {"x": 1}),
        ("add", {"x": 2}),
    ]
    assert len({call.id for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls]
    asked = says("Three.")
    (choice,) = server.create([*USER, choice.message, *results], tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ("Three.", "stop")
    template = ChatTemplate(server.line.tokenizer)
    assert TWO in template.render(asked["messages"], asked["tools"])  # as the model said it


def test_calls_of_a_stream(server, says):
    says(TWO)
    chunks = [chunk.choices[0] for chunk in server.create(USER, tools=TOOLS, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Adding."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "add", '{"x": 1}'),
        (1, "add", '{"x": 2}'),
    ]
    assert chunks[-1].finish_reason == "tool_calls"


def test_one_call_where_only_one_is_wanted(server, says):
    says(TWO)
    (choice,) = server.create(USER, tools=TOOLS, parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls) == 1


def test_without_tools_a_call_is_text(server, says):
    asked = says(TWO)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = server.create(USER, **options).choices
        assert asked["tools"] is None
        assert (choice.message.content, choice.finish_reason) == (TWO, "stop")


def test_a_call_alone_has_no_content(server, says):
    says(TWO.partition("\n")[2])
    (choice,) = server.create(USER, tools=TOOLS).choices
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 2


def test_a_template_without_tools_refuses_them():
    tokenizer = tiny_tokenizer()
    with serving(tiny_llama().eval(), tokenizer) as running:
        with pytest.raises(openai.BadRequestError, match="template does not write tools") as caught:
            running.create(USER, tools=TOOLS)
        assert caught.value.param == "tools"
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        with pytest.raises(openai.BadRequestError, match=r"messages\[1\] holds tool calls, which"):
            running.create([*USER, {"role": "assistant", "tool_calls": [call]}])
