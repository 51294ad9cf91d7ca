"""Every file type gives its rows with their true lines, and a reason for each bad one."""

import bz2
import gzip
import json
import lzma
import re
import sys

import pytest

from xtuner_lite.data.json_window import show_position
from xtuner_lite.data.readers import READERS, suffix_of
from xtuner_lite.data.sources import read_rows


def read(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(READERS[suffix_of(path)](path))


def test_json_array_gives_the_line_of_each_element(tmp_path):
    text = '[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": "x\\n"}\n]\n'
    assert read(tmp_path / "a.json", text) == [
        (2, {"a": 1}, None),
        (4, {"a": 2}, None),
        (5, {"a": "x\n"}, None),
    ]
    assert read(tmp_path / "a.json", b"\xef\xbb\xbf[{}]") == [(1, {}, None)]
    assert read(tmp_path / "a.json", "[ ]") == []


def test_rows_that_share_a_line_are_told_apart(tmp_path):
    rows = read(tmp_path / "a.json", '[{"a": 1}, {"a": 2}, 5,\n{"a": 4}, {"a": 5}]')
    assert [show_position(position) for position, _, _ in rows] == [
        "1", "1 (row 2)", "1 (row 3)", "2", "2 (row 5)",
    ]  # fmt: skip
    places = [row.place for row in read_rows(tmp_path / "a.json")]
    assert places[1] == f"{tmp_path / 'a.json'}:1 (row 2)"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n{"a": }]', 2, "not valid JSON: Expecting value at column 7"),
        ('[{"a": 1}\n{"a": 2}]', 2, r"expected ',' or '\]', found '\{'"),
        ('[{"a": 1},\n{"a": 2}', 2, "found the end of the file"),
        ('[{"a": 1},\n' + "[" * 200_000, 2, "nested too deeply"),
    ],
)
def test_a_broken_array_gives_the_rows_before_the_break(tmp_path, text, line, reason):
    rows = read(tmp_path / "a.json", text)
    assert rows[0] == (1, {"a": 1}, None)
    assert (show_position(rows[-1][0]).split()[0], rows[-1][1]) == (str(line), None)
    assert re.search(reason, rows[-1][2])
    assert "rest of the array cannot be read" in rows[-1][2]


def test_json_lines_under_the_name_json_and_a_single_object(tmp_path):
    assert read(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n') == [
        (1, {"a": 1}, None),
        (2, {"a": 2}, None),
    ]
    assert read(tmp_path / "a.json", '\n{"a":\n 1}') == [(2, {"a": 1}, None)]


def test_jsonl_goes_on_behind_a_bad_line(tmp_path):
    content = (
        b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n{"a": "\xff"}\n5\n' + b"[" * 200_000 + b'\n{"a": 6}'
    )
    rows = read(tmp_path / "a.jsonl", content)
    assert [(line, data) for line, data, _ in rows] == [
        (1, {"a": 1}), (3, None), (4, None), (5, 5), (6, None), (7, {"a": 6}),
    ]  # fmt: skip
    assert rows[1][2] == "not valid JSON: Expecting value at column 7"
    assert rows[2][2] == "not UTF-8 text: byte 0xff at 7"
    assert rows[4][2] == "not valid JSON: nested too deeply"


def test_gz(tmp_path):
    rows = [{"text": "é"}, {"text": "b"}]
    packed = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    assert read(tmp_path / "a.jsonl.gz", packed) == [(1, rows[0], None), (2, rows[1], None)]
    assert "cannot be read further" in read(tmp_path / "b.jsonl.gz", packed[:-12])[-1][2]
    assert "Not a gzipped file" in read(tmp_path / "c.json.gz", b"[{}]")[0][2]


def test_csv_and_tsv(tmp_path):
    text = 'a,b\n1,"x\ny"\n2,z\n3\n4,5,6\n'
    rows = read(tmp_path / "a.csv", text)
    assert rows[:2] == [(2, {"a": "1", "b": "x\ny"}, None), (4, {"a": "2", "b": "z"}, None)]
    assert rows[2] == (5, None, "1 fields, the header names 2")
    assert rows[3] == (6, None, "3 fields, the header names 2")
    assert read(tmp_path / "a.tsv", "a\tb\n1\t2\n") == [(2, {"a": "1", "b": "2"}, None)]
    assert "not UTF-8" in read(tmp_path / "b.csv", b"a,b\n1,\xff\n")[-1][2]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), file)
    assert list(READERS[".parquet"](file)) == [(1, {"text": "a"}, None), (2, {"text": "b"}, None)]
    assert "not a readable parquet file" in read(tmp_path / "b.parquet", b"PAR1xxxxPAR1")[0][2]


def test_txt_is_one_text_a_line(tmp_path):
    assert read(tmp_path / "a.txt", "one\r\n\n two\n") == [
        (1, {"text": "one"}, None),
        (3, {"text": " two"}, None),
    ]


def test_an_array_larger_than_the_window_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.json_window.BLOCK", 7)
    rows = [{"n": n, "text": "é\n\\ [1, 2]" * (n % 5)} for n in range(40)]
    for indent in (None, 1):
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        found = read(tmp_path / "a.json", text)
        assert [row for _, row, _ in found] == rows
        starts = [text.count("\n", 0, m.start()) + 1 for m in re.finditer(r'\{\s*"n"', text)]
        lines = [int(show_position(position).split()[0]) for position, _, _ in found]
        assert lines == starts
    assert [row for _, row, _ in read(tmp_path / "a.json", "[12345678901, -1.5e10, true, 7]")] == [
        12345678901, -1.5e10, True, 7,
    ]  # fmt: skip
    broken = text.replace('"n": 30', '"n": oops')
    found = read(tmp_path / "a.json", broken)
    assert len(found) == 31
    at = broken.index("oops")
    column = at - broken.rindex("\n", 0, at)
    assert found[-1][0] == broken.count("\n", 0, at) + 1
    assert f"Expecting value at column {column};" in found[-1][2]


def test_bytes_that_are_no_text_end_an_array(tmp_path):
    rows = read(tmp_path / "a.json", b'[{"a": 1},\n{"a": 2},\n{"a": "\xff"}]')
    assert rows[:2] == [(1, {"a": 1}, None), (2, {"a": 2}, None)]
    assert rows[2][0] == 3
    assert "not UTF-8 text: byte 0xff; the rest of the file cannot be read" in rows[2][2]


@pytest.mark.parametrize(("ending", "module"), [("bz2", bz2), ("xz", lzma)])
def test_other_compressions(tmp_path, ending, module):
    packed = module.compress(b'{"a": 1}\n{"a": 2}\n' * 50)
    assert len(read(tmp_path / f"a.jsonl.{ending}", packed)) == 100
    assert "cannot be read further" in read(tmp_path / f"b.jsonl.{ending}", packed[:-9])[-1][2]
    packed = module.compress(b'[{"a": 1}, {"a": 2}]')
    assert len(read(tmp_path / f"a.json.{ending}", packed)) == 2
    assert "cannot be read further" in read(tmp_path / f"b.json.{ending}", packed[:-9])[-1][2]


def test_zst_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst.*pip install zstandard"):
        read(tmp_path / "a.jsonl.zst", b"x")


def test_arrow_streams_and_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a", "b", "c"]})
    for make in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        file = tmp_path / "a.arrow"
        with make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert list(READERS[".arrow"](file)) == [
            (1, {"text": "a"}, None), (2, {"text": "b"}, None), (3, {"text": "c"}, None),
        ]  # fmt: skip
        assert list(READERS[".arrow"](file, 2)) == [(3, {"text": "c"}, None)]
    assert "not a readable Arrow file" in read(tmp_path / "b.arrow", b"xxxxxxxx")[0][2]


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 9])
def test_every_reader_skips_rows(tmp_path, skip):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = {
        "a.jsonl": '{"a": 1}\n\n{bad\n{"a": 3}\n{"a": 4}\n',
        "a.json": '[{"a": 1}, {"a": 2},\n{"a": 3},{"a": 4}]',
        "b.json": '{"a": 1}\n\n{"a": 2}\n{"a": 3}\n{"a": 4}',
        "a.csv": "a\n1\n2\n3\n4\n",
        "a.txt": "1\n \n2\n3\n4",
    }
    for name, text in files.items():
        file = tmp_path / name
        rows = read(file, text)
        assert len(rows) == 4
        assert list(READERS[suffix_of(file)](file, skip)) == rows[skip:]
    parquet.write_table(pyarrow.table({"a": [1, 2, 3, 4]}), file := tmp_path / "a.parquet",
                        row_group_size=3)  # fmt: skip
    assert list(READERS[".parquet"](file, skip)) == list(READERS[".parquet"](file))[skip:]
