"""A conversation keeps what was said, and only that."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.data.messages import check_messages
from xtuner_lite.data.readers import READERS
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.sampling import Sampling

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


def test_the_system_message_can_change_at_any_time():
    chat = session()
    assert chat.system is None
    chat.reply("Hello")
    chat.system = "Be brief."
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.system = "Be long."
    assert chat.messages[0]["content"] == chat.system == "Be long."
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be long."}]
    chat.system = None
    assert chat.messages == []


def test_retry_answers_the_last_message_anew(monkeypatch):
    chat = session()
    with pytest.raises(ValueError, match="nothing to answer again; ask something first"):
        list(chat.retry())
    chat.reply("One")
    chat.reply("Two")
    chat.messages[-1] = {"role": "assistant", "content": "old"}
    assert "".join(chat.retry()) == "Hi!"
    assert [m["content"] for m in chat.messages] == ["One", "Hi!", "Two", "Hi!"]
    assert chat.stats.finish_reason == "stop"

    def fails(*args, **options):
        raise ValueError("no")
        yield

    with monkeypatch.context() as patch:
        patch.setattr("xtuner_lite.chat.session.stream_reply", fails)
        for ask in (chat.retry, lambda: chat.send("Three")):
            with pytest.raises(ValueError, match="no"):
                list(ask())
            assert [m["content"] for m in chat.messages] == ["One", "Hi!", "Two", "Hi!"]
    assert "".join(chat.retry()) == "Hi!"  # of the turn that failed
    assert [m["content"] for m in chat.messages[-2:]] == ["Three", "Hi!"]


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_a_saved_conversation_is_a_data_file(tmp_path, name):
    chat = session(system="Sei kurz. 简短。")
    with pytest.raises(ValueError, match="nothing to save yet"):
        chat.save(tmp_path / name)
    chat.reply("Hello")
    chat.save(tmp_path / name)
    ((_, row, error),) = READERS[f".{name.rpartition('.')[2]}"](tmp_path / name)
    assert error is None
    assert check_messages(row["messages"]) == chat.messages
    assert "简短" in (tmp_path / name).read_text(encoding="utf-8")
    with pytest.raises(FileExistsError, match="is left as it is; give another name"):
        chat.save(tmp_path / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and an adapter of it with its own tokenizer in a run's work_dir."""
    tmp_path = tmp_path_factory.mktemp("models")
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


def test_types_and_places(folders):
    model, _ = load_for_chat(folders / "base", dtype="bf16", device="cpu")
    assert model.dtype == torch.bfloat16
    model, tokenizer = load_for_chat(folders / "base", offload_folder=folders / "rest")
    chat = ChatSession(model, tokenizer, sampling=Sampling(max_new_tokens=8))
    assert chat.reply("Hello") == "Hi!"
    with pytest.raises(ValueError, match=r"device 'cuda:99' cannot be used; this machine has: cpu"):
        load_for_chat(folders / "base", device="cuda:99")
    with pytest.raises(ValueError, match="offloading chooses devices itself: leave one of them"):
        load_for_chat(folders / "base", device="cpu", offload_folder="x")


def test_a_model_larger_than_memory_answers_from_the_disk(folders, monkeypatch):
    """All of it, the embedding too, is on the disk; an adapter beside it would be left out."""
    spread = {"device_map": "auto", "max_memory": {"cpu": 1000}, "offload_folder": folders / "x"}
    monkeypatch.setattr("xtuner_lite.chat.load.placement", lambda *args, **options: spread)
    model, tokenizer = load_for_chat(folders / "base")
    assert all(parameter.is_meta for parameter in model.parameters())
    for temperature in (0.0, 1e-3):
        sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=0)
        assert ChatSession(model, tokenizer, sampling=sampling).reply("Hello") == "Hi!"
    with pytest.raises(ValueError, match="merge it first .xtuner-lite convert merge BASE ADAPTER"):
        load_for_chat(folders / "run")


@pytest.mark.slow
def test_a_chat_imports_no_deepspeed(folders):
    """It takes seconds and prints a warning of its own."""
    code = (
        "import sys; from xtuner_lite.cli.main import main; "
        f"assert main(['chat', {str(folders / 'run')!r}, '-p', 'x']) == 0; "
        "print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("Hi!\nFalse\n", "")


def test_wrong_folders_are_named(folders):
    (folders / "young/checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="without a finished checkpoint"):
        load_for_chat(folders / "young")
    with pytest.raises(ValueError, match="is an adapter of .* itself, and another one is given"):
        load_for_chat(folders / "run", adapter=folders / "base")
