"""The report page: what it shows, and that nothing of a run can run in it."""

import socket
import struct
import threading
import urllib.error
import urllib.request
from xml.etree import ElementTree

import pytest

from tests.report.test_run_record import work_dir, write_lines  # noqa: F401  a fixture
from xtuner_lite.cli.main import main
from xtuner_lite.report.curves import draw_curves, thin
from xtuner_lite.report.live import LiveReport, make_server
from xtuner_lite.report.page import render_report
from xtuner_lite.report.run_record import RunRecord, read_run

NASTY = "<script>alert(1)</script><!--BODY-->"


def ask(question, reply, step):
    return {"step": step, "messages": [{"role": "user", "content": question}], "reply": reply}


@pytest.fixture
def run(tmp_path):
    return RunRecord(
        tmp_path / "my_run",
        metrics=[
            *(
                {"mode": "train", "step": s, "loss": 4.0 / s, "lr": 0.1, "num_tokens": 100,
                 "step_time_s": 2.0, "units/a": 3}
                for s in range(1, 101)
            ),
            {"mode": "val", "step": 50, "loss": 1.25, "exact_match": 0.5},
            {"mode": "val", "step": 100, "loss": 1.75, "exact_match": None},
        ],
        samples=[ask("你是谁？", f"answer {s}", s) for s in (0, 50, 100)] + [ask(NASTY, NASTY, 0)],
        ledgers=[("train_dataloader", "rows read 7")],
        config="lr = 0.1",
        max_iters=100,
    )  # fmt: skip


def test_the_page_shows_the_run(run):
    page = render_report(run)
    for text in ("finished", "100 / 100", "0.0400", "1.2500", "10,000", "0:03:20", "rows read 7"):
        assert f"{text}" in page, text
    newest, middle, first = (page.index(f"answer {step}") for step in (100, 50, 0))
    assert newest < middle < first
    assert "lr = 0.1" in page
    assert 'http-equiv="refresh"' not in page


def test_headings_in_chinese(run):
    page = render_report(run, language="zh")
    assert "对话样例的变化" in page
    assert 'lang="zh-CN"' in page
    with pytest.raises(ValueError, match="language is 'fr'; it must be one of en, zh"):
        render_report(run, language="fr")


def test_nothing_of_the_run_is_html(run):
    run.config = run.preview = run.environment = run.failure = NASTY
    run.ledgers, run.notes, run.max_iters = [(NASTY, NASTY)], [NASTY], None
    page = render_report(run)
    assert run.state == "failed"
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "default-src 'none'" in page


def test_a_run_without_anything_still_has_a_page(tmp_path):
    page = render_report(RunRecord(tmp_path))
    assert "nothing yet" in page
    assert "No chat samples" in page


def test_curves(run):
    curves = draw_curves(run)
    assert [curve.name for curve in curves] == ["loss", "lr", "exact_match"]
    assert curves[0].summary == "train: 0.04 at step 100; validation: 1.75 at step 100"
    assert curves[2].summary == "validation: 0.5 at step 50"
    for curve in curves:
        assert ElementTree.fromstring(curve.svg).tag.endswith("svg")
    assert draw_curves(run) == curves  # the same run, the same file


def test_long_lines_are_thinned_to_means():
    points = [(step, float(step % 2)) for step in range(1, 4001)]
    thinned = thin(points, 1000)
    assert len(thinned) == 1000
    assert thinned[0] == (4, 0.5)
    assert thinned[-1] == (4000, 0.5)
    assert thin(points[:1000], 1000) == points[:1000]


def test_the_command_writes_the_page(work_dir, capsys):  # noqa: F811
    assert main(["report", str(work_dir), "--lang", "en"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "optimizer steps" in (work_dir / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(work_dir), "--out", str(work_dir)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["report", str(work_dir / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_live_page_follows_the_run(work_dir):  # noqa: F811
    report = LiveReport(work_dir, refresh_s=3)
    before = report.page()
    assert report.page() is before  # not made anew for nothing
    write_lines(
        work_dir / "metrics.jsonl",
        [{"mode": "train", "step": step, "loss": 0.5} for step in range(1, 8)],
    )
    assert read_run(work_dir).last_step == 7
    after = report.page()
    assert ">7<" in after
    assert ">7<" not in before
    assert 'content="3"' in after


def test_only_this_machine_is_answered(work_dir):  # noqa: F811
    with make_server(LiveReport(work_dir), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with urllib.request.urlopen(address + "/", timeout=20) as answer:
                assert b"optimizer steps" in answer.read()
            foreign = urllib.request.Request(address + "/", headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(foreign, timeout=20)
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + "/metrics.jsonl", timeout=20)
            with pytest.raises(ValueError, match=f"port {server.server_port} .* cannot be used"):
                make_server(LiveReport(work_dir), server.server_port)
        finally:
            server.shutdown()


def test_a_reader_that_leaves_early_is_no_error(capfd):
    asked = threading.Event()
    left = threading.Event()

    class Slow:
        def page(self):
            asked.set()
            assert left.wait(20)
            return "x" * 20_000_000

    with make_server(Slow(), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        reader = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
        reader.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert asked.wait(20)
        # Without lingering the end is a reset, which the server meets while it writes.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader.close()
        left.set()
        server.shutdown()
        thread.join(20)
    assert "Traceback" not in capfd.readouterr().err
