"""A conversation keeps what was said, and only that."""

import pytest
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.chat.session import ChatSession, load_for_chat
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.generate import Sampling
from xtuner_lite.models.loading import load_causal_lm

TOKENIZER = tiny_tokenizer()


def session(**options):
    return ChatSession(tiny_speaker(TOKENIZER, "Hi!"), TOKENIZER, **options)


def test_history_grows_turn_by_turn():
    chat = session(system="Be brief.")
    assert chat.reply("Hello") == "Hi!"
    assert chat.reply("Again") == "Hi!"
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in chat.messages] == ["Be brief.", "Hello", "Hi!", "Again", "Hi!"]
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_stopped_reply_stays_as_far_as_it_came():
    chat = session()
    stream = chat.send("Hello")
    first = next(stream)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}


def test_a_failed_turn_leaves_no_trace():
    chat = ChatSession(tiny_llama(max_position_embeddings=16), TOKENIZER)
    with pytest.raises(ValueError, match="sees 16 at once"):
        chat.reply("one two " * 20)
    assert chat.messages == []


@pytest.fixture
def folders(tmp_path):
    """A base model, and an adapter of it with its own tokenizer in a run's work_dir."""
    tiny_speaker(TOKENIZER, "Hi!").save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    sft = SupervisedFinetune(load_causal_lm(tmp_path / "base"), lora=LoraConfig(r=2))
    checkpoint = tmp_path / "run/checkpoints/iter_5"
    sft.save_pretrained(checkpoint)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOKENIZER.chat_template + "{# trained with #}"
    tokenizer.save_pretrained(checkpoint)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "adapter", "adapted"),
    [
        ("base", None, False),
        ("run/checkpoints/iter_5", None, True),
        ("run", None, True),
        ("base", "run/checkpoints/iter_5", True),
        ("base", "run", True),
    ],
)
def test_model_adapter_checkpoint_and_work_dir(folders, model, adapter, adapted):
    loaded, tokenizer = load_for_chat(folders / model, adapter=adapter and folders / adapter)
    assert hasattr(loaded, "peft_config") is adapted
    assert tokenizer.chat_template.endswith("{# trained with #}") is adapted
    assert not loaded.training
    chat = ChatSession(loaded, tokenizer, sampling=Sampling(max_new_tokens=8))
    assert chat.reply("Hello") == "Hi!"


def test_wrong_folders_are_named(folders):
    (folders / "young/checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="without a finished checkpoint"):
        load_for_chat(folders / "young")
    with pytest.raises(ValueError, match="is an adapter of .* itself, and another one is given"):
        load_for_chat(folders / "run", adapter=folders / "base")
