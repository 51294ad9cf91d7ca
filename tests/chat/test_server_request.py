"""Which fields of a request are served, ignored or refused."""

import pytest
from pydantic import ValidationError

from xtuner_lite.chat.server.errors import ApiError
from xtuner_lite.chat.server.request import ChatRequest, read_order

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


def order(messages=(USER,), **fields):
    request = ChatRequest.model_validate({"model": "m", "messages": list(messages), **fields})
    return read_order(request, max_new_tokens=100)


def refusal(messages=(USER,), **fields):
    with pytest.raises(ApiError) as caught:
        order(messages, **fields)
    assert caught.value.status_code == 400
    return caught.value.body["error"]


def test_defaults_are_openais():
    sampling = order().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.seed, sampling.stop_words) == (None, ())
    assert sampling.max_new_tokens == 100


def test_what_is_asked_is_passed_on():
    sampling = order(
        temperature=0, top_p=0.5, top_k=3, repetition_penalty=1.2, seed=-1, stop=["a", "b"],
        max_tokens=7, max_completion_tokens=7,
    ).sampling  # fmt: skip
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert (sampling.repetition_penalty, sampling.seed) == (1.2, 2**63 - 1)
    assert (sampling.stop_words, sampling.max_new_tokens) == (("a", "b"), 7)


def test_fields_that_ask_for_nothing_and_fields_of_the_service_are_ignored():
    nothing = {
        "n": 1, "logprobs": False, "top_logprobs": None, "frequency_penalty": 0,
        "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "modalities": ["text"], "user": "me", "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "reasoning_effort": None, "something": None,
    }  # fmt: skip
    assert order(**nothing).sampling == order().sampling


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("logprobs", True, r"log-probabilities are not given; leave it out"),
        ("top_logprobs", 3, "log-probabilities are not given"),
        ("n", 2, "send the request that many times"),
        ("n", True, "one answer a request"),
        ("frequency_penalty", 0.5, "repetition_penalty"),
        ("presence_penalty", -1, "repetition_penalty"),
        ("logit_bias", {"50256": -100}, "leave it out"),
        ("response_format", {"type": "json_object"}, "ask for JSON in the messages"),
        ("modalities", ["text", "audio"], "only text"),
        ("functions", [{"name": "f"}], "use tools"),
        ("reasoning_effort", "high", "leave it out"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(name, value, advice):
    error = refusal(**{name: value})
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"
    assert f"{name} is {value!r}"[:60] in error["message"]
    assert advice in error["message"]


def test_a_misspelled_field_is_refused():
    error = refusal(temprature=0)
    assert error["message"] == "unknown field 'temprature'; did you mean 'temperature'?"
    assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.1}, {"temperature": float("nan")}, {"temperature": "0"}, {"top_p": 0},
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": True}, {"stream": "yes"},
        {"seed": 2**63}, {"stop": 5}, {"stop": [5]}, {"messages": []}, {"messages": ["x"]},
        {"stream_options": {"usage": True}}, {"tools": "x"}, {"model": None},
    ],
)  # fmt: skip
def test_values_out_of_range_and_of_another_type(fields):
    with pytest.raises(ValidationError):
        order(**fields)


def test_limits_of_the_answer():
    assert "max_tokens is 101; this server allows at most 100" in refusal(max_tokens=101)["message"]
    error = refusal(max_tokens=3, max_completion_tokens=4)
    assert "they mean the same: give one" in error["message"]
    assert "at least one character" in refusal(stop=["a", ""])["message"]
    assert "set stream to true" in refusal(stream_options={})["message"]


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        ({"role": "bot", "content": "x"}, "messages[1]", "role is 'bot'; allowed: system"),
        ({"role": "user", "content": 5}, "messages[1]", "messages[1]: content is 5; allowed: text"),
        ({"role": "function", "name": "f"}, "messages[1].role", "send role 'tool'"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1]", "only the assist"),
        ({"role": "user", "content": "x", "audio": {"id": 1}}, "messages[1].audio", "'audio'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]",
         "part of type 'input_audio'; this model reads text only"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]", "part of type None"),
        ({"role": "user", "content": "\ud800"}, "messages[1]", "lone surrogate (U+D800)"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
         "messages[1]", "arguments of 'f': not valid JSON"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(message, param, text):
    error = refusal([USER, message])
    assert error["param"] == param
    assert text in error["message"]


def test_an_answer_of_the_clients_own_library_can_be_sent_back():
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [],
              "audio": None, "function_call": None, "tool_calls": [CALL]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "a", "content": "2"}
    messages = order([USER, answer, result], tools=[TOOL]).messages
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        # parsed, as the training data are
        "tool_calls": [{"type": "function", "id": "a",
                        "function": {"name": "add", "arguments": {"x": 1}}}],
    }  # fmt: skip
    assert messages[2] == result


def test_tools_and_tool_choice():
    assert order(tools=[TOOL]).tools == [TOOL]
    assert order(tools=[TOOL], tool_choice="auto").max_calls is None
    assert order(tools=[TOOL], tool_choice="none").tools is None
    assert order(tools=[TOOL], parallel_tool_calls=False).max_calls == 1
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        error = refusal(tools=[TOOL], tool_choice=choice)
        assert "allowed: 'auto', 'none'. A call cannot be forced" in error["message"]
    assert "give tools" in refusal(tool_choice="auto")["message"]
    assert refusal(tools=[{"type": "web_search"}])["param"] == "tools[0].type"
    assert (
        "has no function name" in refusal(tools=[{"type": "function", "function": {}}])["message"]
    )
