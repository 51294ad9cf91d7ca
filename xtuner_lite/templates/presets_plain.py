"""Named chat templates whose roles are plain words and whose turns end with EOS. Data only."""

from __future__ import annotations

from xtuner_lite.registry import TEMPLATES
from xtuner_lite.templates.parts import JinjaTemplate, TemplateParts


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
def zephyr() -> TemplateParts:
    """Zephyr: <|user|> and <|assistant|> as plain words, EOS behind every turn."""
    return TemplateParts(
        system="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{input}{eos}\n",
        assistant="<|assistant|>\n",
        suffix="{eos}",
        sep="\n",
    )


@TEMPLATES.register_module(name=["llama2_chat", "code_llama_chat"])
def llama2_chat() -> JinjaTemplate:
    """Llama 2 and Code Llama: [INST] with the system prompt in <<SYS>>, BOS and EOS each round."""
    return JinjaTemplate("llama2_chat.jinja")


@TEMPLATES.register_module(name=["mistral", "mixtral"])
def mistral() -> TemplateParts:
    """Mistral and Mixtral (v0.1, v0.2): [INST] and EOS; the system prompt in the first [INST]."""
    return TemplateParts(
        user="[INST] {input} [/INST]",
        first_user="[INST] {system}\n\n{input} [/INST]",
        assistant="",
        suffix="{eos}",
        start="{bos}",
    )


@TEMPLATES.register_module(name=["deepseek_v2", "deepseek_moe"])
def deepseek_v2() -> TemplateParts:
    """DeepSeek LLM, MoE and V2: User: and Assistant:, EOS behind each answer."""
    return TemplateParts(
        system="{system}\n\n",
        user="User: {input}\n\n",
        assistant="Assistant:",
        lead=" ",
        suffix="{eos}",
        start="{bos}",
    )


@TEMPLATES.register_module(name=["vicuna", "wizardlm"])
def vicuna() -> TemplateParts:
    """Vicuna 1.1 and WizardLM: USER: and ASSISTANT:, EOS behind each answer."""
    return TemplateParts(
        system="{system} ",
        user="USER: {input} ",
        assistant="ASSISTANT:",
        lead=" ",
        suffix="{eos}",
        start="{bos}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    )


@TEMPLATES.register_module()
def wizardcoder() -> TemplateParts:
    """WizardCoder and Alpaca: ### Instruction: and ### Response:, EOS behind each answer."""
    return TemplateParts(
        system="{system}\n\n",
        user="### Instruction:\n{input}\n\n",
        assistant="### Response:",
        suffix="{eos}",
        sep="\n\n",
        start="{bos}",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request."
        ),
    )


@TEMPLATES.register_module()
def chatglm2() -> JinjaTemplate:
    """ChatGLM2: numbered rounds of 问： and 答：, EOS behind each answer."""
    return JinjaTemplate("chatglm2.jinja", ("[gMASK]", "sop"))


@TEMPLATES.register_module()
def moss_sft() -> JinjaTemplate:
    """MOSS: thoughts, commands and results of its plug-ins; <eom> and EOS behind each answer.

    With tools a turn starts at <|Inner Thoughts|>: and the results of its commands are followed by
    <|MOSS|>:, the answer; without tools it is the answer alone.
    """
    return JinjaTemplate("moss_sft.jinja")
