"""Named chat templates with special tokens of their own. Data only: one function per preset.

The first docstring line is what ``xtuner-lite list templates`` prints. Formats of plain words are
in presets_plain.py.
"""

from __future__ import annotations

from dataclasses import replace

from xtuner_lite.registry import TEMPLATES
from xtuner_lite.templates.parts import JinjaTemplate, TemplateParts

_TURNS = ("user", "assistant")
_ALL = ("system", "user", "assistant")
_CHATML = TemplateParts(
    system="<|im_start|>system\n{system}<|im_end|>\n",
    user="<|im_start|>user\n{input}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    suffix="<|im_end|>",
    sep="\n",
    thought="<think>\n{thought}\n</think>\n\n",
    tools="hermes",
    tokens=("<|im_start|>", "<|im_end|>"),
)


@TEMPLATES.register_module()
def chatml() -> TemplateParts:
    """ChatML: <|im_start|>role and <|im_end|>; tools and calls in Hermes form, <think>."""
    return _CHATML


@TEMPLATES.register_module()
def qwen_chat() -> TemplateParts:
    """Qwen, Qwen1.5 and Qwen2: ChatML with the system prompt 'You are a helpful assistant.'"""
    return replace(_CHATML, default_system="You are a helpful assistant.")


@TEMPLATES.register_module()
def qwen3() -> TemplateParts:
    """Qwen3: ChatML with a <think> block, empty where there is no thought, in every answer.

    Qwen3's own template takes the block out of earlier answers once later questions follow, so
    that several turns of one conversation cannot be learnt at once. This preset keeps it, and
    agrees with Qwen3's own on conversations of one question.
    """
    return replace(_CHATML, always_thought=True)


@TEMPLATES.register_module()
def internlm2_chat() -> TemplateParts:
    """InternLM2 and InternLM2.5: BOS and ChatML."""
    return TemplateParts(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{input}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        sep="\n",
        start="{bos}",
        tokens=("<|im_start|>", "<|im_end|>"),
    )


@TEMPLATES.register_module()
def llama3_chat() -> TemplateParts:
    """Llama 3: <|start_header_id|>role<|end_header_id|> and <|eot_id|>."""
    return TemplateParts(
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        suffix="<|eot_id|>",
        start="<|begin_of_text|>",
        trim=_ALL,
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )


@TEMPLATES.register_module()
def gemma() -> TemplateParts:
    """Gemma and Gemma 2: <start_of_turn>user and <end_of_turn>; no system prompt."""
    return TemplateParts(
        user="<start_of_turn>user\n{input}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        suffix="<end_of_turn>",
        sep="\n",
        start="{bos}",
        trim=_TURNS,
        tokens=("<start_of_turn>", "<end_of_turn>"),
    )


@TEMPLATES.register_module()
def gemma3() -> TemplateParts:
    """Gemma 3: as Gemma, with the system prompt at the beginning of the first user turn."""
    return TemplateParts(
        user="<start_of_turn>user\n{input}<end_of_turn>\n",
        first_user="<start_of_turn>user\n{system}\n\n{input}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        suffix="<end_of_turn>",
        sep="\n",
        start="{bos}",
        trim=_TURNS,
        tokens=("<start_of_turn>", "<end_of_turn>"),
    )


@TEMPLATES.register_module()
def phi3_chat() -> TemplateParts:
    """Phi-3: <|user|>, <|assistant|> and <|end|>."""
    return TemplateParts(
        system="<|system|>\n{system}<|end|>\n",
        user="<|user|>\n{input}<|end|>\n",
        assistant="<|assistant|>\n",
        suffix="<|end|>",
        sep="\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    )


@TEMPLATES.register_module()
def cohere_chat() -> TemplateParts:
    """Command R and Aya: <|START_OF_TURN_TOKEN|> with a role token, <|END_OF_TURN_TOKEN|>."""
    turn, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    return TemplateParts(
        system=turn + "<|SYSTEM_TOKEN|>{system}" + end,
        user=turn + "<|USER_TOKEN|>{input}" + end,
        assistant=turn + "<|CHATBOT_TOKEN|>",
        suffix=end,
        start="{bos}",
        trim=_TURNS,
        tokens=(turn, end, "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    )


@TEMPLATES.register_module()
def glm4() -> JinjaTemplate:
    """GLM-4: <|user|> and <|assistant|>; an answer ends with the next role's token; tools.

    What ends an answer is <|user|>, or <|observation|> behind a call: the tokens GLM-4 stops at.
    Behind the last turn GLM-4's own template leaves it out, and nothing would teach to stop.
    """
    roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    return JinjaTemplate("glm4.jinja", ("[gMASK]", "<sop>", *roles))


@TEMPLATES.register_module()
def chatglm3() -> JinjaTemplate:
    """ChatGLM3: as GLM-4, with a space in front of each text; no tools."""
    roles = ("<|system|>", "<|user|>", "<|assistant|>")
    return JinjaTemplate("chatglm3.jinja", ("[gMASK]", "sop", *roles))


@TEMPLATES.register_module()
def gpt_oss() -> JinjaTemplate:
    """gpt-oss (harmony) without tools: analysis and final channels; no date in the head.

    The last answer ends with <|return|>, at which generation stops, earlier ones with <|end|>: of
    a conversation of several turns only the last can be learnt (train_on='last'). For tools use
    the template that the model's tokenizer carries.
    """
    tokens = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
    return JinjaTemplate("gpt_oss.jinja", tokens)


@TEMPLATES.register_module()
def internlm_chat() -> TemplateParts:
    """InternLM (first generation): <|User|>: and <|Bot|>:, <eoh> and <eoa>."""
    return TemplateParts(
        system="<|System|>:{system}\n",
        user="<|User|>:{input}<eoh>\n",
        assistant="<|Bot|>:",
        suffix="<eoa>",
        sep="\n",
        start="{bos}",
        tokens=("<eoh>", "<eoa>"),
    )


@TEMPLATES.register_module()
def baichuan_chat() -> TemplateParts:
    """Baichuan: <reserved_102> and <reserved_103> in front of the turns, EOS behind answers."""
    return TemplateParts(
        system="{system}",
        user="<reserved_102>{input}",
        assistant="<reserved_103>",
        suffix="{eos}",
        tokens=("<reserved_102>", "<reserved_103>"),
    )


@TEMPLATES.register_module()
def baichuan2_chat() -> TemplateParts:
    """Baichuan 2: <reserved_106> and <reserved_107> in front of the turns, EOS behind answers."""
    return TemplateParts(
        system="{system}",
        user="<reserved_106>{input}",
        assistant="<reserved_107>",
        suffix="{eos}",
        tokens=("<reserved_106>", "<reserved_107>"),
    )


@TEMPLATES.register_module()
def minicpm() -> TemplateParts:
    """MiniCPM: <用户> and <AI>, EOS behind answers; the system prompt stands in front."""
    return TemplateParts(
        user="<用户>{input}",
        first_user="<用户>{system}\n{input}",
        assistant="<AI>",
        suffix="{eos}",
        start="{bos}",
        trim=_TURNS,
    )


@TEMPLATES.register_module(name=["deepseek_coder", "deepseekcoder"])
def deepseek_coder() -> TemplateParts:
    """DeepSeek Coder: ### Instruction: and ### Response:, <|EOT|> behind answers."""
    return TemplateParts(
        system="{system}",
        user="### Instruction:\n{input}\n",
        assistant="### Response:",
        lead="\n",
        suffix="\n<|EOT|>",
        sep="\n",
        start="{bos}",
        default_system=(
            "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by "
            "Deepseek Company, and you only answer questions related to computer science. For "
            "politically sensitive questions, security and privacy issues, and other non-computer "
            "science questions, you will refuse to answer\n"
        ),
        tokens=("<|EOT|>",),
    )
