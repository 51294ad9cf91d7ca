"""Several processes give what one gives, in the same order."""

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset


def test_two_processes_equal_one(monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.parallel.CHUNK_ROWS", 10)
    rows = [{"instruction": f"{n}?", "output": "word " * (n % 9 + 1)} for n in range(35)]
    one = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=64)
    two = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=64, num_proc=2)
    assert one.ledger == two.ledger
    for a, b in zip(one, two, strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        assert a["labels"].tolist() == b["labels"].tolist()
