"""The presets: those of XTuner 0.1 and today's, beside the models' own templates."""

import re

import pytest

from tests.templates import official
from tests.tiny import tiny_tokenizer
from xtuner_lite.templates import ChatTemplate, RowRefused, TemplateError, apply_template
from xtuner_lite.templates.apply import preset, preset_names
from xtuner_lite.templates.system_prompts import system_prompt

XTUNER_NAMES = [
    "default", "zephyr", "internlm_chat", "internlm2_chat", "moss_sft", "llama2_chat",
    "code_llama_chat", "chatglm2", "chatglm3", "qwen_chat", "baichuan_chat", "baichuan2_chat",
    "wizardlm", "vicuna", "wizardcoder", "deepseek_coder", "deepseek_moe", "deepseek_v2", "mistral",
    "mixtral", "minicpm", "gemma", "cohere_chat", "llama3_chat", "phi3_chat", "deepseekcoder",
]  # fmt: skip
NEWER_NAMES = ["chatml", "qwen3", "gemma3", "glm4", "gpt_oss"]

SYSTEM = {"role": "system", "content": " Be brief.\n"}
ASKED = {"role": "user", "content": " Who are you?\n"}
ANSWERED = {"role": "assistant", "content": "A helper. "}
TURNS = [
    ASKED,
    ANSWERED,
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "é"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
RESULT = {"role": "tool", "content": "42"}


def tokenizer_for(name: str):
    """The tiny tokenizer with the tokens a preset needs; <|endoftext|> as BOS."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_tokens(list(preset(name).tokens), special_tokens=True)
    return tokenizer


def template_for(name: str) -> ChatTemplate:
    return ChatTemplate(apply_template(tokenizer_for(name), name))


def learnt(template: ChatTemplate, chat, tools=None, **options) -> list[str]:
    layout = template.layout(chat, tools, **options)
    return [layout.text[span.start : span.end] for span in layout.spans]


def test_every_preset_is_there():
    assert preset_names() == sorted(XTUNER_NAMES + NEWER_NAMES)
    assert len(XTUNER_NAMES) == 26


#: preset -> (the model's own template, writes a system prompt, what ours adds behind answers)
OFFICIAL = {
    "zephyr": (official.ZEPHYR, True, ""),
    "internlm2_chat": (official.INTERNLM2, True, ""),
    "qwen_chat": (official.QWEN1_5, True, ""),
    "llama2_chat": (official.LLAMA2, True, ""),
    "code_llama_chat": (official.LLAMA2, True, ""),
    "mistral": (official.MISTRAL, False, ""),
    "mixtral": (official.MISTRAL, False, ""),
    "deepseek_v2": (official.DEEPSEEK_V2, True, ""),
    "deepseek_moe": (official.DEEPSEEK_V2, True, ""),
    "deepseek_coder": (official.DEEPSEEK_CODER, True, ""),
    "chatml": (official.INTERNLM2.removeprefix("{{ bos_token }}"), True, ""),
    "llama3_chat": (official.file("llama3"), True, ""),
    "gemma": (official.file("gemma"), False, ""),
    "gemma3": (official.file("gemma3"), True, ""),
    "cohere_chat": (official.file("cohere"), True, ""),
    "phi3_chat": (official.file("phi3"), True, ""),
    "chatglm3": (official.CHATGLM3, True, "<|user|>"),
    "glm4": (official.GLM4, True, "<|user|>"),
    "minicpm": (official.MINICPM, False, "<|im_end|>"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_tokens_are_those_of_the_models_own_template(name):
    source, has_system, added = OFFICIAL[name]
    tokenizer = tokenizer_for(name)
    if name == "llama3_chat":
        tokenizer.bos_token = "<|begin_of_text|>"
    theirs = lambda chat, prompt=False: tokenizer.apply_chat_template(  # noqa: E731
        chat, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )
    ours = ChatTemplate(apply_template(tokenizer_for(name), name))
    for chat in [
        TURNS,
        TURNS[:2],
        *([[SYSTEM, *TURNS], [SYSTEM, *TURNS[:2]]] if has_system else []),
    ]:
        expected = theirs(chat)
        if name == "phi3_chat":  # writes EOS behind the whole
            expected = expected.removesuffix(tokenizer.eos_token)
        if name == "minicpm":
            expected = "<|endoftext|>" + expected
            expected = expected.replace("<用户>你好", added + "<用户>你好")
        ids = ours.encode(chat).input_ids.tolist()
        assert tokenizer.decode(ids) == expected + added
        assert ids == tokenizer(expected + added, add_special_tokens=False)["input_ids"]
        if name not in ("minicpm",):
            assert (
                ours.prompt_ids(chat[:-1])
                == (tokenizer(theirs(chat[:-1], True), add_special_tokens=False)["input_ids"])
            )


def test_qwen3_agrees_with_its_own_template_on_one_question():
    tokenizer = tokenizer_for("qwen3")
    ours = template_for("qwen3")
    thought = {**ANSWERED, "reasoning_content": "\nWho am I?\n"}
    for chat, tools in [
        ([ASKED, ANSWERED], None),
        ([SYSTEM, ASKED, thought], None),
        ([SYSTEM, ASKED, thought], [TOOL]),
        ([ASKED, {**CALL, "reasoning_content": "Ask f."}, RESULT, RESULT, thought], [TOOL]),
    ]:
        expected = tokenizer.apply_chat_template(
            chat, tools, chat_template=official.file("qwen3"), tokenize=False
        )
        assert ours.render(chat, tools) == expected
    assert learnt(ours, TURNS) == [
        "<think>\n\n</think>\n\nA helper. <|im_end|>",
        "<think>\n\n</think>\n\né<|im_end|>",
    ]


def test_hermes_tools_are_qwens():
    tokenizer = tokenizer_for("chatml")
    ours = template_for("chatml")
    chat = [SYSTEM, ASKED, CALL, RESULT, RESULT, ANSWERED]
    expected = tokenizer.apply_chat_template(
        chat, [TOOL], chat_template=official.file("qwen2_5"), tokenize=False
    )
    assert ours.render(chat, [TOOL]) == expected
    assert learnt(ours, chat, [TOOL]) == [
        '<tool_call>\n{"name": "f", "arguments": {"a": "1"}}\n</tool_call><|im_end|>',
        "A helper. <|im_end|>",
    ]


def test_gpt_oss_by_hand():
    ours = template_for("gpt_oss")
    chat = [SYSTEM, ASKED, {**ANSWERED, "reasoning_content": "Say so."}]
    assert ours.render(chat) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, "
        "final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\n Be brief.\n\n\n<|end|>"
        "<|start|>user<|message|> Who are you?\n<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Say so.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A helper. <|return|>"
    )
    assert learnt(ours, chat) == [
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>A helper. <|return|>",
    ]
    assert learnt(ours, TURNS, train_on="last") == ["<|channel|>final<|message|>é<|return|>"]
    with pytest.raises(TemplateError, match="Set train_on='last'"):
        ours.layout(TURNS)


def test_glm4_ends_a_turn_with_the_next_roles_token():
    ours = template_for("glm4")
    chat = [SYSTEM, ASKED, CALL, RESULT, ANSWERED]
    text = ours.render(chat, [TOOL])
    assert text.startswith('[gMASK]<sop><|system|>\n# 可用工具\n\n## f\n\n{\n    "name": "f"')
    assert text.endswith(
        '<|assistant|>f\n{"a": "1"}<|observation|>\n42<|assistant|>\nA helper. <|user|>'
    )
    assert learnt(ours, chat, [TOOL]) == [
        'f\n{"a": "1"}<|observation|>',
        "\nA helper. <|user|>",
    ]
    user, observation = ours.tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    assert (ours.end_token_ids, ours.call_end_token_ids) == ([user], [observation])
    assert ours.stop_token_ids() == [user, observation, ours.tokenizer.eos_token_id]
    for bad in ([ASKED, CALL, ASKED], [ASKED, ANSWERED, RESULT], [ASKED, ANSWERED, ANSWERED]):
        with pytest.raises(RowRefused):
            ours.render(bad)


def test_chatglm2_numbers_its_rounds():
    assert template_for("chatglm2").render([SYSTEM, *TURNS]) == (
        "[gMASK]sop Be brief.\n\n\n[Round 1]\n\n问： Who are you?\n\n\n答：A helper. <|im_end|>\n\n"
        "[Round 2]\n\n问：你好\n\n答：é<|im_end|>\n\n"
    )


def test_moss_with_and_without_tools():
    ours = template_for("moss_sft")
    chat = [SYSTEM, ASKED, {**CALL, "reasoning_content": "Ask f."}, RESULT, ANSWERED]
    assert ours.render(chat, [TOOL]) == (
        "Be brief.\n<|Human|>:  Who are you?\n<eoh>\n<|Inner Thoughts|>: Ask f.<eot>\n"
        '<|Commands|>: f("1")<eoc><|im_end|>\n<|Results|>:\n42\n<eor>\n'
        "<|MOSS|>: A helper. <eom><|im_end|>\n"
    )
    assert learnt(ours, chat, [TOOL]) == [
        '<eot>\n<|Commands|>: f("1")<eoc><|im_end|>',
        " A helper. <eom><|im_end|>",
    ]
    assert learnt(ours, TURNS) == [" A helper. <eom><|im_end|>", " é<eom><|im_end|>"]
    assert "None<eoc>\n<|Results|>: None<eor>\n<|MOSS|>: A helper." in ours.render(
        TURNS[:2], [TOOL]
    )
    assert "- d: enabled. API: f()\n" in ours.render(TURNS[:2], [TOOL])
    with pytest.raises(RowRefused, match="one round of commands"):
        ours.render([ASKED, CALL, RESULT, CALL], [TOOL])


def test_a_system_prompt_inside_the_first_user_turn_needs_one():
    ours = template_for("gemma3")
    assert ours.render([SYSTEM, *TURNS]).count("Be brief.") == 1
    ours = template_for("llama2_chat")
    assert ours.render([SYSTEM, *TURNS]).count("<<SYS>>") == 1
    with pytest.raises(RowRefused, match="a system message that no user message follows"):
        ours.render([SYSTEM, ANSWERED])
    with pytest.raises(RowRefused, match="a system message behind the first message"):
        ours.render([ASKED, SYSTEM, ANSWERED])
    with pytest.raises(TemplateError, match="system and first_user are both given"):
        apply_template(
            tiny_tokenizer(None),
            dict(user="{input}", assistant="", suffix="{eos}", system="{system}",
                 first_user="{system}{input}"),
        )  # fmt: skip


@pytest.mark.parametrize("name", XTUNER_NAMES + NEWER_NAMES)
def test_tokens_that_the_tokenizer_lacks_are_named(name):
    tokenizer = tiny_tokenizer(None)
    missing = [t for t in preset(name).tokens if t not in ("<|im_start|>", "<|im_end|>")]
    if not missing:
        apply_template(tokenizer, name)
        return
    with pytest.raises(TemplateError, match=re.escape(f"needs the tokens {', '.join(missing)}")):
        apply_template(tokenizer, name)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("name", ["default", "chatglm2", "moss_sft"])
def test_a_preset_that_ends_with_eos_needs_one(name):
    tokenizer = tokenizer_for(name)
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="ends answers with EOS, but the tokenizer has no eos"):
        apply_template(tokenizer, name)


def test_system_prompts():
    for name in (
        "alpaca",
        "arxiv_gentile",
        "coder",
        "colorist",
        "lawyer",
        "medical",
        "moss_sft",
        "sql",
    ):
        assert len(system_prompt(name)) > 40
    with pytest.raises(KeyError, match="unknown system prompt 'layer'.*did you mean 'lawyer'"):
        system_prompt("layer")
