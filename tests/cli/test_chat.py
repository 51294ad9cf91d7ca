"""`chat` on the command line: one-shot, piped, dialogue, errors."""

import argparse
import io
import subprocess
import sys

import pytest

from tests.tiny import tiny_speaker, tiny_tokenizer
from xtuner_lite.cli import chat

TOKENIZER = tiny_tokenizer()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_speaker(TOKENIZER, "Hi!").save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def run(*argv):
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return chat.run(parser.parse_args(argv))


def test_one_shot(folder, capsys):
    assert run(folder, "-p", "Hello") == 0
    assert capsys.readouterr().out == "Hi!\n"


def test_one_prompt_from_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run(folder, "-p", "-") == 0
    assert capsys.readouterr().out == "Hi!\n"


def test_piped_lines_are_turns(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/clear\ntwo\n/exit\nthree\n"))
    assert run(folder) == 0
    assert capsys.readouterr().out == "Hi!\nHi!\n"


def dialogue(monkeypatch, turns):
    """Answers input() with ``turns``; an exception among them is raised."""
    monkeypatch.setattr("sys.stdin", Terminal())
    pending = iter(turns)

    def answer(prompt):
        turn = next(pending)
        if isinstance(turn, BaseException):
            raise turn
        return turn

    monkeypatch.setattr("builtins.input", answer)


def test_dialogue(folder, capsys, monkeypatch):
    dialogue(monkeypatch, ["Hello", "", "/clear", "/what", KeyboardInterrupt(), "/exit"])
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "bot> Hi!" in out
    assert "forgotten" in out
    assert "unknown command /what; /clear forgets" in out
    assert "/exit leaves" in out


def test_end_of_input_leaves(folder, monkeypatch):
    dialogue(monkeypatch, [EOFError()])
    assert run(folder) == 0


def test_ctrl_c_stops_the_reply_not_the_program(folder, capsys, monkeypatch):
    from xtuner_lite.chat.session import ChatSession

    own = ChatSession.send
    stopped = []

    def send(self, text):
        for piece in own(self, text):
            yield piece
            if text == "stop me":
                stopped.append(text)
                raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "send", send)
    dialogue(monkeypatch, ["stop me", "Hello", "/exit"])
    assert run(folder) == 0
    assert stopped
    assert "[stopped]" in (out := capsys.readouterr().out)
    assert out.rstrip().endswith("bot> Hi!")


def test_a_too_long_turn_does_not_end_the_dialogue(folder, capsys, monkeypatch):
    dialogue(monkeypatch, ["one two " * 400, "Hello", "/exit"])
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "error: the conversation has" in out
    assert out.rstrip().endswith("bot> Hi!")


def test_errors_are_one_line_and_exit_code_2(tmp_path, folder, capsys):
    assert run(str(tmp_path / "nothing"), "-p", "x") == 2
    assert capsys.readouterr().err.startswith("error: no model folder")
    assert run(folder, "-p", "x", "--temperature", "-1") == 2
    assert "temperature is -1.0; it must be 0 or more" in capsys.readouterr().err
    assert run(folder, "--template", "chatmll") == 2
    assert "chatml" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import argparse, sys; from xtuner_lite.cli import chat; "
        "chat.add_arguments(argparse.ArgumentParser()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
