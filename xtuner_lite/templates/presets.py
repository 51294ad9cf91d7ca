"""Named chat templates for models that ship none. Data only: one function per preset.

The first docstring line is what ``xtuner-lite list templates`` prints.
"""

from __future__ import annotations

from xtuner_lite.registry import TEMPLATES
from xtuner_lite.templates.parts import TemplateParts


@TEMPLATES.register_module()
def default() -> TemplateParts:
    """<|User|>: and <|Bot|>: as plain words, EOS behind each answer; fits any tokenizer."""
    return TemplateParts(
        system="<|System|>:{system}\n",
        user="<|User|>:{input}\n",
        assistant="<|Bot|>:",
        suffix="{eos}",
        sep="\n",
        start="{bos}",
    )


@TEMPLATES.register_module()
def chatml() -> TemplateParts:
    """ChatML: <|im_start|>role and <|im_end|>; tools and calls in Hermes form."""
    return TemplateParts(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{input}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        sep="\n",
        tools="hermes",
        tokens=("<|im_start|>", "<|im_end|>"),
    )


@TEMPLATES.register_module()
def qwen_chat() -> TemplateParts:
    """Qwen, Qwen1.5 and Qwen2: ChatML with the system prompt 'You are a helpful assistant.'"""
    return TemplateParts(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{input}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        sep="\n",
        default_system="You are a helpful assistant.",
        tools="hermes",
        tokens=("<|im_start|>", "<|im_end|>"),
    )


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
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )


@TEMPLATES.register_module()
def zephyr() -> TemplateParts:
    """Zephyr: <|user|> and <|assistant|> as plain words, EOS behind every turn."""
    return TemplateParts(
        system="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{input}{eos}\n",
        assistant="<|assistant|>\n",
        suffix="{eos}",
        sep="\n",
    )


@TEMPLATES.register_module()
def vicuna() -> TemplateParts:
    """Vicuna 1.1: USER: and ASSISTANT: as plain words, EOS behind each answer."""
    return TemplateParts(
        system="{system} ",
        user="USER: {input} ",
        assistant="ASSISTANT:",
        suffix="{eos}",
        start="{bos}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
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
