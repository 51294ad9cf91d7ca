"""The page: every token once, marked right, and nothing in the data can break out of it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.data.preview_html import render_page

NASTY = (
    "</div></article><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' "
    "<!--TITLE--> \u202egnp.exe \x1b[2J 你好 🙂 👩\u200d👩\u200d👧"
)


class Reader(HTMLParser):
    """Collects tags, and the (tag, text) of the tokens inside each article's text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []  # (tag, class, text)
        self.inside: list[tuple[str, str]] = []
        self.in_article = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.in_article |= tag == "article"
        if self.in_article and tag in ("b", "i"):
            self.tokens.append((tag, dict(attrs).get("class") or "", ""))
            self.inside.append((tag, ""))

    def handle_endtag(self, tag):
        self.in_article &= tag != "article"
        if self.inside and tag == self.inside[-1][0]:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            tag, classes, text = self.tokens[-1]
            self.tokens[-1] = (tag, classes, text + data)


def page_of(rows, **options) -> tuple[str, Reader, ChatDataset]:
    tokenizer = tiny_tokenizer()
    dataset = ChatDataset(rows, tokenizer=tokenizer, max_length=400)
    samples = [(f"Sample {i}", dataset[i]) for i in range(len(dataset))]
    page = render_page(samples, tokenizer, title="cfg.py", **options)
    reader = Reader()
    reader.feed(page)
    return page, reader, dataset


def test_tokens_and_mask():
    rows = [
        {"instruction": "Who are you?", "output": "A cat."},
        {"instruction": "Hi", "output": "Hello"},
    ]
    page, reader, dataset = page_of(rows)
    text = "".join(text for _, _, text in reader.tokens)
    assert text == tiny_tokenizer().decode(dataset[0]["input_ids"])
    learnt = "".join(text for tag, _, text in reader.tokens if tag == "b")
    assert learnt == "A cat.<|im_end|>Hello<|im_end|>"
    assert len(reader.tokens) == len(dataset[0]["input_ids"])  # all ASCII: a token, an element
    assert ("b", "s", "<|im_end|>") in reader.tokens
    assert reader.tags.count("article") == 2  # one box a row
    assert "rows:1" in page
    assert "rows:2" in page
    assert page.count("<u></u>\n") == 8  # two rows with four line breaks each


def test_nothing_in_the_data_breaks_out():
    rows = [{"instruction": NASTY, "output": NASTY}]
    page, reader, _ = page_of(rows, ledger=Ledger(name=NASTY))
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert "\u202e" not in page
    assert "\x1b" not in page
    shown = "".join(text for _, _, text in reader.tokens)
    expected = NASTY.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert shown.count(expected) == 2
    assert ("b", "", "🙂") in reader.tokens  # several tokens, one character
    assert "<pre>&lt;/div&gt;&lt;/article&gt;&lt;script&gt;" in page


def test_the_page_loads_nothing_and_runs_one_script():
    page, _, _ = page_of([{"instruction": "Hi", "output": "Hello"}])
    assert not re.findall(r"https?://|url\(|@import|\bsrc=|<link", page)
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    assert f"{policy}{digest}'" in page


def test_weights_are_shown_where_they_begin():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "loss": 0.5},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "No"},
    ]
    page, reader, _ = page_of([{"messages": messages}])
    weighted = "".join(text for _, classes, text in reader.tokens if "w" in classes.split())
    assert weighted == "Yes<|im_end|>"
    assert page.count("<sup>&times;0.5</sup>") == 2  # the legend's and this one
    assert " weight 0.5" in page


def test_a_character_cut_by_the_mask_is_not_joined():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("🙂")["input_ids"])
    labels = np.where(np.arange(len(ids)) < 2, -100, ids)
    page = render_page([("s", {"input_ids": ids, "labels": labels})], tokenizer, title="t")
    reader = Reader()
    reader.feed(page)
    assert [tag for tag, _, _ in reader.tokens] == ["i", "b", "b"]
