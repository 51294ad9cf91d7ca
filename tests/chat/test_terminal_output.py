"""What reaches a terminal: text without commands, and a spinner that leaves no trace."""

import io

import pytest

from xtuner_lite.chat.terminal_output import Waiting, print_reply, printable, well_formed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch, term="xterm"):
    """What is shown on it; a fixture would be undone by pytest's own capture."""
    monkeypatch.setenv("TERM", term)
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", out)
    return out


def pieces(*texts, failure=None):
    yield from texts
    if failure is not None:
        raise failure


def test_escape_sequences_do_not_reach_a_terminal(monkeypatch):
    terminal = open_terminal(monkeypatch)
    print_reply(pieces("a\x1b[2J", "b\x07\tc\n", "\x9b31md你好"), name="bot")
    shown = terminal.getvalue().rpartition("bot> ")[2]
    assert shown == "a[2Jb\tc\n31md你好\n"


def test_a_pipe_gets_the_text_as_it_is(capsys):
    print_reply(pieces("a\x1b[2J", "b"))
    assert capsys.readouterr().out == "a\x1b[2Jb\n"


def test_the_spinner_is_gone_before_the_first_piece(monkeypatch):
    terminal = open_terminal(monkeypatch)
    print_reply(pieces("Hi", "!"), name="bot")
    shown = terminal.getvalue()
    assert "thinking" in shown
    assert "\x1b[?25h" in shown  # the cursor is shown again
    assert shown.endswith("\x1b[2Kbot> Hi!\n")  # its line was erased


@pytest.mark.parametrize("streamed", [True, False])
def test_the_spinner_is_gone_after_a_failure(monkeypatch, streamed):
    terminal = open_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        print_reply(pieces("Hi", failure=KeyboardInterrupt()), streamed=streamed)
    assert terminal.getvalue().endswith("Hi" if streamed else "\x1b[2K")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_no_spinner_where_it_cannot_be_erased(monkeypatch, term):
    terminal = open_terminal(monkeypatch, term)
    print_reply(pieces("Hi"), name="bot")
    assert terminal.getvalue() == "bot> Hi\n"


def test_no_spinner_in_a_file(capsys):
    with Waiting("loading") as waiting:
        waiting.update("still loading")
    assert capsys.readouterr() == ("", "")


def test_text_is_made_printable_and_well_formed():
    assert printable("a\r\nb\x00\u200b") == "a\nb\u200b"
    assert well_formed("é\udcff") == "é\N{REPLACEMENT CHARACTER}"
