"""`chat` on the command line: one-shot, piped, dialogue, batches, and every mistake told."""

import importlib.util
import io
import json
import subprocess
import sys

import pytest
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.cli.main import main
from xtuner_lite.methods.sft import SupervisedFinetune

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
    return main(["chat", *argv])


def refused(capsys, *argv, code=2):
    """What a command that is refused says, in one line."""
    assert run(*argv) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err


# ------------------------------------------------------------------ one prompt, pipes


@pytest.mark.parametrize("more", [(), ("--no-streamer",), ("--torch-dtype", "bf16")])
def test_one_shot(folder, capsys, more):
    assert run(folder, "-p", "Hello", *more) == 0
    assert capsys.readouterr().out == "Hi!\n"


def test_stop_words(folder, capsys):
    assert run(folder, "-p", "Hello", "--stop-words", "?", "!") == 0
    assert capsys.readouterr().out == "Hi\n"


def test_one_prompt_from_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run(folder, "-p", "-") == 0
    assert capsys.readouterr().out == "Hi!\n"


def test_piped_lines_are_turns_and_only_replies_go_to_stdout(folder, capsys, monkeypatch):
    lines = "one\n\n/system Be brief.\n/clear\n/etc/hosts\n/exit\nthree\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run(folder) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hi!\nHi!\n"
    assert captured.err == "system message: Be brief.\nforgotten\n"


def test_a_piped_turn_that_cannot_be_answered_ends_the_run(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one two " * 400 + "\nHello\n"))
    assert "the conversation has" in refused(capsys, folder)


@pytest.mark.parametrize("prompt", [["-p", "bad \udcff byte"], []])
def test_input_that_is_not_utf8_is_told(folder, capsys, monkeypatch, prompt):
    stream = io.TextIOWrapper(io.BytesIO(b"bad \xff byte\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", stream)
    assert run(folder, *prompt) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hi!\n"
    assert "note: the input is not all UTF-8" in captured.err


def test_no_input_at_all(folder, capsys, monkeypatch):
    assert "the prompt is empty" in refused(capsys, folder, "-p", " ")
    monkeypatch.setattr("sys.stdin", None)
    assert "there is no input; give a prompt with -p TEXT" in refused(capsys, folder)


# ------------------------------------------------------------------ dialogue


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
    dialogue(monkeypatch, ["Hello", "", "/clear", "/cleer", KeyboardInterrupt(), "/help", "/exit"])
    assert run(folder, "--bot-name", "Nova") == 0
    out = capsys.readouterr().out
    assert "\nNova> Hi!\n" in out
    assert "forgotten" in out
    assert "unknown command '/cleer'; did you mean '/clear'? /help lists them" in out
    assert "\n/exit leaves" in out
    assert "/save FILE" in out


def test_end_of_input_leaves(folder, monkeypatch):
    dialogue(monkeypatch, [EOFError()])
    assert run(folder) == 0


def test_system_save_and_retry(folder, capsys, monkeypatch, tmp_path):
    file = tmp_path / "talk.json"
    turns = [
        "/retry", f"/save {file}", "/system", "/system Be brief.", "Hello", "/retry", "/save",
        f"/save {file}", f"/save {file}", f"/save {tmp_path}/none/x.json", "/system -", "/exit",
    ]  # fmt: skip
    dialogue(monkeypatch, turns)
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "there is nothing to answer again" in out
    assert "error: there is nothing to save yet" in out
    assert out.count("system message: the default of the template") == 2
    assert "(the temperature is 0: the same reply comes again" in out
    assert out.count("bot> Hi!") == 2
    assert "give a file: /save talk.json" in out
    assert f"error: {file} exists and is left as it is; give another name" in out
    assert "No such file or directory" in out
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in row["messages"]] == ["Be brief.", "Hello", "Hi!"]


def test_several_lines_in_quotes_are_one_turn(folder, monkeypatch):
    sent = []
    monkeypatch.setattr(ChatSession, "send", lambda self, text: sent.append(text) or iter(()))
    monkeypatch.setattr("xtuner_lite.chat.terminal.print_reply", lambda pieces, **options: None)
    monkeypatch.setattr("xtuner_lite.chat.terminal.TerminalChat._tell_end", lambda self: None)
    dialogue(monkeypatch, ['"""/exit', "one", 'two"""', '"""alone"""', "/exit"])
    assert run(folder) == 0
    assert sent == ["/exit\none\ntwo", "alone"]


def test_ctrl_c_stops_the_reply_not_the_program(folder, capsys, monkeypatch):
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


def test_a_turn_that_fails_does_not_end_the_dialogue(folder, capsys, monkeypatch):
    dialogue(monkeypatch, ["one two " * 400, "Hello", "/exit"])
    assert run(folder, "--max-new-tokens", "1") == 0
    out = capsys.readouterr().out
    assert "error: the conversation has" in out
    assert "shorten it or start anew (/clear starts anew)" in out
    assert "[cut after 1 tokens; see --max-new-tokens]" in out


# ------------------------------------------------------------------ batches


def test_a_batch_of_text_lines(folder, capsys, tmp_path):
    (tmp_path / "ask.txt").write_text("Who are you?\n\n你好\n", encoding="utf-8")
    assert run(folder, "--batch", str(tmp_path / "ask.txt")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["reply"]) for row in rows] == [
        ("Who are you?", "Hi!"),
        ("你好", "Hi!"),
    ]
    assert rows[0]["finish_reason"] == "stop"
    assert rows[0]["prompt_tokens"] > 0
    assert rows[0]["completion_tokens"] > 1


def test_a_batch_of_rows_keeps_them_and_goes_on_after_one_that_fails(folder, capsys, tmp_path):
    image = {"type": "image_url", "image_url": {"url": "cat.png"}}
    asked = [
        {"id": 7, "prompt": "Hello"},
        {"messages": [{"role": "user", "content": [image]}]},
        {"prompt": "one two " * 400},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
    ]
    (tmp_path / "ask.json").write_text(json.dumps(asked), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    options = ("--batch", str(tmp_path / "ask.json"), "--out", str(out))
    assert run(folder, *options, "--system", "Be brief.") == 1
    assert "2 of 4 prompts have an error" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert (rows[0]["id"], rows[0]["reply"], rows[3]["reply"]) == (7, "Hi!", "Hi!")
    assert "message 2 (user) holds a part of type 'image'; this model reads" in rows[1]["error"]
    assert "the model sees 512 at once" in rows[2]["error"]
    assert rows[0]["prompt_tokens"] > rows[3]["prompt_tokens"]  # its own system message is shorter
    assert "exists and is left as it is; give another --out" in refused(capsys, folder, *options)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"prompt\nx\n", "ends with '.csv'; allowed: .txt, .json"),
        ("a.txt", b"\n", "holds no prompt"),
        ("a.txt", b"fine\nb\xff\n", "a.txt:2: not UTF-8 text: byte 0xff at 1"),
        ("a.jsonl", b'{"prompt": 3}', 'a.jsonl:1: "prompt" is 3; it must be text'),
        ("a.jsonl", b'{"question": "x"}', 'an object with either "prompt" or "messages"'),
        ("a.jsonl", b'{"messages": [{"role": "bot", "content": "x"}]}', "role is 'bot'; allowed"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}',
            "the last message is the assistant's; there is nothing to answer",
        ),
    ],
)
def test_a_batch_that_cannot_be_read_is_told_before_the_model_loads(
    folder, capsys, tmp_path, name, content, told
):
    (tmp_path / name).write_bytes(content)
    assert told in refused(capsys, "no/such/model", "--batch", str(tmp_path / name))


def test_files_of_a_batch_that_are_not_there(folder, capsys, tmp_path):
    assert "no file of prompts" in refused(capsys, folder, "--batch", str(tmp_path / "none.txt"))
    assert "--out is for --batch" in refused(capsys, folder, "-p", "x", "--out", "y")


# ------------------------------------------------------------------ mistakes


def test_a_path_that_leads_nowhere(folder, capsys, tmp_path):
    assert "no model folder" in refused(capsys, str(tmp_path / "nothing"), "-p", "x")
    (tmp_path / "empty").mkdir()
    told = refused(capsys, str(tmp_path / "empty"), "-p", "x")
    assert "is no model folder: it has no config.json and no weights" in told
    assert "no adapter folder" in refused(capsys, folder, "-p", "x", "--adapter", "none")


def test_an_adapter_of_another_model(folder, capsys, tmp_path):
    sft = SupervisedFinetune(tiny_llama(hidden_size=64), lora=LoraConfig(r=2))
    sft.save_pretrained(tmp_path / "adapter")
    told = refused(capsys, folder, "-p", "x", "--adapter", str(tmp_path / "adapter"))
    assert "does not fit this model" in told


def test_a_model_without_a_chat_template(folder, capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    capsys.readouterr()  # the progress bar of saving
    told = refused(capsys, str(tmp_path), "-p", "x")
    assert "has no chat template: it is a base model" in told
    assert "--prompt-template chatml" in told
    assert (
        run(str(tmp_path), "-p", "x", "--prompt-template", "chatml", "--max-new-tokens", "2") == 0
    )


def test_a_template_that_raises(folder, capsys, tmp_path):
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no such talk') }}")
    told = refused(capsys, folder, "-p", "x", "--template", str(tmp_path / "strict.jinja"))
    assert "the chat template refuses the conversation (roles: user): no such talk" in told


def test_names_that_are_misspelled(folder, capsys):
    assert "did you mean 'chatml'" in refused(capsys, folder, "--prompt-template", "chatmll")
    assert "did you mean 'coder'" in refused(capsys, folder, "--system-template", "codr")
    assert "device 'cdua' cannot be used; this machine has: cpu" in refused(
        capsys, folder, "-p", "x", "--device", "cdua"
    )


def test_options_out_of_range_are_told_before_the_model_loads(capsys):
    told = refused(capsys, "no/such/model", "-p", "x", "--temperature", "-1")
    assert "temperature is -1.0; it must be 0 or more" in told


def test_bits_without_bitsandbytes(folder, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    told = refused(capsys, folder, "-p", "x", "--bits", "4")
    assert "--bits 4 needs the bitsandbytes package: pip install bitsandbytes" in told


def test_a_model_larger_than_memory(folder, capsys, monkeypatch):
    def load(*args, **options):
        raise MemoryError("3 GB asked for")

    monkeypatch.setattr("xtuner_lite.chat.load.load_for_chat", load)
    told = refused(capsys, folder, "-p", "x", code=1)
    assert "does not fit into memory (3 GB asked for); try --bits 4" in told


def test_help_names_the_system_templates_and_needs_no_torch():
    code = (
        "import argparse, sys; from xtuner_lite.cli import chat; parser = argparse.ArgumentParser()"
        "; chat.add_arguments(parser); print(parser.format_help()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "  coder           Writes and explains programs." in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
