"""Forced answers through OpenAI's client: random weights say what the request demands, whole and streamed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.serve.options import Settings
from ernietune.text.messages import parse_conversation
from ernietune.text.parse import ParserChoice
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer
from ernietune.text.toolcall import call_frame
from tests import tiny
from tests.serve.speaker import served
from tests.tiny_tokenizer import write_tokenizer

ASK = [{"role": "user", "content": "Weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "城市": {"enum": ["巴黎", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["城市", "days"],
    "additionalProperties": False,
}
LOCATED = SCHEMA | {"properties": {"x": {"type": "boolean"}}, "required": ["x"]}


def function(name: str, schema: dict | None) -> dict:
    return {"type": "function", "function": {"name": name} | ({"parameters": schema} if schema else {})}


TOOLS = [function("weather", SCHEMA), function("locate", LOCATED)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """The same random model behind a format that always thinks and one that never does."""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    model = tiny.model("tiny-dense", vocab_size=tokenizer.vocab_size)
    options = EngineOptions(max_batched_tokens=256)
    return {
        kind: Engine(
            model,
            tokenizer,
            Template.for_checkpoint(tokenizer, "ernie4_5", kind),
            max_length=1500,
            options=options,
        )
        for kind in ("thinking", "text")
    }


@pytest.fixture(scope="module")
def peers(engines: dict[str, Engine]) -> Iterator[dict[str, openai.OpenAI]]:
    def settings(kind: str) -> Settings:
        return Settings("tiny", ParserChoice.of(None, None, kind))

    with (
        served(engines["thinking"], settings("thinking")) as thinking,
        served(engines["text"], settings("text")) as text,
    ):
        yield {
            kind: openai.OpenAI(base_url=f"{url}/v1", api_key="null", max_retries=0)
            for kind, url in (("thinking", thinking), ("text", text))
        }


def ask(peer: openai.OpenAI, stream: bool, **fields: object):
    """(content, reasoning, calls, finish reason) of the only choice."""
    fixed = {"model": "m", "messages": ASK, "temperature": 1.2, "seed": 4, "max_tokens": 900}
    if not stream:
        (choice,) = peer.chat.completions.create(**fixed | fields).choices
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
        said = choice.message.model_dump()
        return said["content"] or "", said.get("reasoning_content") or "", calls, choice.finish_reason
    content, reasoning, calls, reason = "", "", [], None
    for chunk in peer.chat.completions.create(**fixed | fields, stream=True):
        (choice,) = chunk.choices
        delta = choice.delta.model_dump()
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            if call["function"]["name"]:
                calls.append((call["function"]["name"], ""))
            name, arguments = calls[call["index"]]
            calls[call["index"]] = (name, arguments + (call["function"]["arguments"] or ""))
        reason = choice.finish_reason or reason
    return content, reasoning, calls, reason


def ids_of(engines: dict[str, Engine], text: str) -> list[int]:
    return engines["text"].tokenizer.encode(text)


JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
FORMS = {
    "json_schema": ({"response_format": JSON_SCHEMA}, None),
    "guided_json": ({"extra_body": {"guided_json": SCHEMA}}, None),
    "guided_json as text": ({"extra_body": {"guided_json": json.dumps(SCHEMA)}}, None),
    "guided_regex": ({"extra_body": {"guided_regex": "(雨|sun){2}[0-9]"}}, "(雨|sun){2}[0-9]"),
    "guided_choice": ({"extra_body": {"guided_choice": ["下雨", 'a "b"\n']}}, '下雨|a "b"\n'),
    "guided_grammar": ({"extra_body": {"guided_grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
    "structured_outputs": ({"extra_body": {"structured_outputs": {"regex": "[ab]{3}"}}}, "[ab]{3}"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["text", "thinking"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form(peers: dict[str, openai.OpenAI], kind: str, name: str, stream: bool) -> None:
    fields, pattern = FORMS[name]
    fields = json.loads(json.dumps(fields))
    if kind == "thinking":
        fields.setdefault("extra_body", {})["reasoning_max_tokens"] = 10
    content, reasoning, _, reason = ask(peers[kind], stream, **fields)
    assert reason == "stop"
    assert bool(reasoning) == (kind == "thinking")
    if pattern is None:
        jsonschema.validate(json.loads(content), SCHEMA)
    elif name == "guided_choice":
        assert content in ("下雨", 'a "b"\n', 'a "b"')  # ernie45's parser takes the newline for layout
    else:
        assert re.fullmatch(pattern, content)


def test_any_object_will_do(engines, peers: dict[str, openai.OpenAI]) -> None:
    close = 60.0  # a random model would go on writing keys for ever
    bias = {str(token): close for token in ids_of(engines, "}")}
    content, *_ = ask(peers["text"], False, response_format={"type": "json_object"}, logit_bias=bias)
    assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_named_tool_is_called_once_with_its_arguments(
    peers: dict[str, openai.OpenAI], stream: bool
) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    extra = {"reasoning_max_tokens": 5}
    content, _, calls, reason = ask(
        peers["thinking"], stream, tools=TOOLS, tool_choice=named, extra_body=extra
    )
    assert (content, reason) == ("", "tool_calls")
    ((name, arguments),) = calls
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), SCHEMA)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_some_tool_is_called_where_one_is_required(peers: dict[str, openai.OpenAI], stream: bool) -> None:
    schemas = {"weather": SCHEMA, "locate": LOCATED}
    seen = set()
    for seed in range(4):
        _, _, calls, reason = ask(
            peers["thinking"],
            stream,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            extra_body={"reasoning_max_tokens": 3},
        )
        assert reason == "tool_calls"
        ((name, arguments),) = calls
        jsonschema.validate(json.loads(arguments), schemas[name])
        seen.add(name)
    assert seen == {"weather", "locate"}


def test_a_tool_without_parameters_gets_an_object(engines, peers: dict[str, openai.OpenAI]) -> None:
    bias = {str(token): 60.0 for token in ids_of(engines, "}")}
    _, _, calls, _ = ask(
        peers["thinking"],
        False,
        tools=[function("now", None)],
        tool_choice={"type": "function", "function": {"name": "now"}},
        logit_bias=bias,
        extra_body={"reasoning_max_tokens": 3},
    )
    assert [name for name, _ in calls] == ["now"]
    assert isinstance(json.loads(calls[0][1]), dict)


def test_a_form_leaves_the_model_free_to_call_a_tool_instead(
    engines, peers: dict[str, openai.OpenAI]
) -> None:
    """With tools at hand the answer fits the schema or is a call: a strong bias decides which."""
    kinds = set()
    for name in ("<tool_call>", "{"):
        content, _, calls, _ = ask(
            peers["thinking"],
            False,
            tools=TOOLS[:1],
            response_format=JSON_SCHEMA,
            parallel_tool_calls=False,
            logit_bias={str(token): 8.0 for token in ids_of(engines, name)},
            extra_body={"reasoning_max_tokens": 0},
        )
        jsonschema.validate(json.loads(calls[0][1] if calls else content), SCHEMA)
        kinds.add(bool(calls))
    assert kinds == {True, False}


def test_a_plain_format_is_forced_to_call_too(peers: dict[str, openai.OpenAI]) -> None:
    _, _, calls, _ = ask(peers["text"], False, tools=TOOLS[:1], tool_choice="required")
    assert {name for name, _ in calls} == {"weather"}
    jsonschema.validate(json.loads(calls[0][1]), SCHEMA)


def test_nobody_is_forced_to_a_call_that_no_parser_would_read(engines: dict[str, Engine]) -> None:
    settings = Settings("tiny", ParserChoice.of(None, "none", "text"))
    with served(engines["text"], settings) as url:
        peer = openai.OpenAI(base_url=f"{url}/v1", api_key="null", max_retries=0)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(peer, False, tools=TOOLS, tool_choice="required")
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_json": {"type": "foo"}}, "guided_json", "Invalid type"),
        ({"guided_regex": "a", "tools": [{"type": "function"}]}, "messages", "function"),
        ({"guided_grammar": "what"}, "guided_grammar", "no grammar"),
        ({"structured_outputs": {"json": {"type": 1}}}, "structured_outputs.json", "cannot be followed"),
        ({"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"}, "tool_choice", "guided_regex"),
    ],
)
def test_a_wrong_form_is_refused_by_its_field(peers, fields: dict, param: str, reason: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=reason) as caught:
            ask(peers["thinking"], stream, extra_body=fields)
        assert caught.value.param == param


def test_without_the_extra_the_answer_is_the_command_that_installs_it(peers, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'ernietune\[guided\]'") as caught:
        ask(peers["text"], False, extra_body={"guided_regex": "never asked before"})
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize("limit", [0, 1, 7, 30])
@pytest.mark.parametrize("field", ["reasoning_max_tokens", "thinking_token_budget"])
def test_a_thought_ends_where_it_has_to(peers: dict[str, openai.OpenAI], field: str, limit: int) -> None:
    peer = peers["thinking"]
    answer = peer.chat.completions.create(
        model="m",
        messages=ASK,
        max_tokens=60,
        seed=2,
        extra_body={field: limit, "ignore_eos": True, "allowed_token_ids": [*range(300, 340)]},
    )
    details = answer.usage.completion_tokens_details
    # The closing tag is the last token of the thought.
    assert details.reasoning_tokens == limit + 1
    assert answer.usage.completion_tokens == 60
    assert len(answer.choices[0].message.content) > 0


def test_a_thought_that_ends_by_itself_is_left_alone(engines, peers: dict[str, openai.OpenAI]) -> None:
    (close,) = ids_of(engines, "</think>")
    free = {"logit_bias": {str(close): 100.0}, "max_tokens": 5, "seed": 1}
    with_limit = ask(peers["thinking"], False, **free, extra_body={"reasoning_max_tokens": 50})
    assert with_limit == ask(peers["thinking"], False, **free)
    assert ask(peers["text"], False, extra_body={"reasoning_max_tokens": 0}, max_tokens=9)[1] == ""


def test_the_form_may_begin_in_the_thought(peers: dict[str, openai.OpenAI]) -> None:
    extra = {"guided_regex": "[ab]{4}", "enable_in_reasoning": True}
    content, reasoning, _, _ = ask(peers["thinking"], False, extra_body=extra)
    assert re.fullmatch("[ab]{4}", reasoning)
    assert content == ""


def test_a_text_is_in_a_thought_only_where_it_says_so(engines: dict[str, Engine]) -> None:
    """A parser that is named takes thoughts of chats for granted; a prompt of /v1/completions is as it is."""
    settings = Settings("tiny", ParserChoice.of("ernie45", None, "thinking"))
    body = {"prompt": "One", "guided_regex": "[ab]{4}", "reasoning_max_tokens": 3, "seed": 1}
    with served(engines["thinking"], settings) as url:
        plain = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        body["prompt"] = "One <think>\n"
        thought = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert re.fullmatch("[ab]{4}", plain["choices"][0]["text"])
    assert re.fullmatch("(?s).+</think>\n{0,2}[ab]{4}", thought["choices"][0]["text"])


def test_the_best_of_several_is_the_one_with_the_most_probable_tokens(
    peers: dict[str, openai.OpenAI],
) -> None:
    fields = {"model": "m", "prompt": "One two", "max_tokens": 6, "seed": 9, "temperature": 1.5}
    tries = peers["text"].completions.create(**fields, n=5, logprobs=0)
    means = [np.mean(choice.logprobs.token_logprobs) for choice in tries.choices]
    order = np.argsort(means)[::-1]
    best = peers["text"].completions.create(**fields, n=2, best_of=5)
    assert [choice.text for choice in best.choices] == [tries.choices[i].text for i in order[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == tries.usage.completion_tokens
    both = peers["text"].completions.create(**fields | {"prompt": ["One two", "x"]}, best_of=5)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == best.choices[0].text


def test_the_priority_of_a_request_reaches_the_engine(engines, peers, monkeypatch) -> None:
    seen = []
    run = engines["text"].run

    def spy(request, params, deliver, priority=0):
        seen.append(priority)
        return run(request, params, deliver, priority)

    monkeypatch.setattr(engines["text"], "run", spy)
    ask(peers["text"], False, max_tokens=1, extra_body={"priority": -3})
    peers["text"].completions.create(model="m", prompt="x", max_tokens=1, extra_body={"priority": 7})
    assert seen == [-3, 7]


def test_a_forced_call_is_written_as_a_history_shows_it(engines: dict[str, Engine]) -> None:
    """The grammar's frame is that of the chat format, word for word."""
    call = {"type": "function", "function": {"name": '名 "q"', "arguments": {"x": 1}}}
    record = {"messages": [*ASK, {"role": "assistant", "tool_calls": [call]}]}
    engine = engines["thinking"]
    rendered = engine.template.render(parse_conversation(record, "test"))
    before, behind = call_frame('名 "q"')
    assert before + '{"x": 1}' + behind in engine.tokenizer.decode(rendered.ids)
