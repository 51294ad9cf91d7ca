"""The Modelfile's template says what the chat template says, for every preset that can be said."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.export.modelfile import go_template, modelfile, turn_texts
from xtuner_lite.export.publish import ExportError
from xtuner_lite.templates import apply_template, preset_names

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chatml():
    texts = turn_texts(tiny_tokenizer())
    assert (texts.begin, texts.prompt, texts.default_system) == ("", "<|im_start|>assistant\n", "")
    assert texts.around == {
        "system": ("<|im_start|>system\n", "<|im_end|>\n"),
        "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    }
    assert go_template(texts) == (
        '{{- range .Messages }}{{- if eq .Role "system" }}{{ "<|im_start|>system\\n" }}'
        '{{ .Content }}{{ "<|im_end|>\\n" }}{{- else if eq .Role "user" }}'
        '{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}'
        '{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ .Content }}'
        '{{ "<|im_end|>\\n" }}{{- end }}{{- end }}{{ "<|im_start|>assistant\\n" }}'
    )


def test_a_default_system_message():
    text = modelfile(tiny_tokenizer(SMOLLM), "x.gguf")
    assert 'SYSTEM """You are helpful"""' in text
    assert text.startswith('FROM ./x.gguf\n\nTEMPLATE """{{- range')


def test_presets():
    """turn_texts proves itself on five conversations; what it cannot say it refuses."""
    said, refused = [], []
    for name in preset_names():
        tokenizer = tiny_tokenizer()
        tokens = ["<s>", "</s>", "<|end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        try:
            apply_template(tokenizer, name)
        except ValueError:
            continue  # needs tokens this tokenizer has not
        try:
            turn_texts(tokenizer)
            said.append(name)
        except ExportError:
            refused.append(name)
    assert len(said) >= 3, (said, refused)


def test_a_template_that_counts_turns():
    counting = "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
    with pytest.raises(ExportError, match="is not a text around each turn"):
        turn_texts(tiny_tokenizer(counting))
