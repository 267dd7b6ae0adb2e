"""A bad request is a 4xx in OpenAI's form, whatever is wrong with it, and the next one is served."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from ernietune.serve import schemas
from ernietune.serve.api import create_app
from ernietune.serve.options import Settings
from tests.serve.speaker import Speaker

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
USER = {"role": "user", "content": "?"}
BROKEN_CALL = {"function": {"name": "f", "arguments": "{"}}


def said(**message: object) -> dict:
    return {"messages": [{"role": "user", "content": "?"} | message]}


def chat(**fields: object) -> dict:
    return {"messages": [USER]} | fields


def text(**fields: object) -> dict:
    return {"prompt": "x"} | fields


def image(url: object) -> dict:
    return said(content=[{"type": "image_url", "image_url": {"url": url}}])


TABLE = [
    (CHAT, {}, "messages", "required"),
    (CHAT, [], None, "dictionary"),
    (CHAT, chat(messages=[]), "messages", "at least 1"),
    (CHAT, chat(messages="hi"), "messages", "list"),
    (CHAT, chat(messages=["hi"]), "messages.0", "dictionary"),
    (CHAT, said(role="wizard"), "messages", "wizard"),
    (CHAT, said(content=None), "messages", "content"),
    (CHAT, said(content=3), "messages", "number"),
    (
        CHAT,
        said(content=[{"type": "video_url", "video_url": {"url": "x", "fps": 0}}]),
        "messages",
        "fps is 0",
    ),
    (CHAT, said(content=[{"type": "audio_url", "audio_url": {"url": "x"}}]), "messages", "audio_url"),
    (CHAT, said(colour="red"), "messages", "colour"),
    (CHAT, said(content="\ud800"), None, "surrogate"),
    (CHAT, chat(messages=[USER, {"role": "system", "content": "x"}]), "messages", "system"),
    (
        CHAT,
        said(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "messages",
        "JSON",
    ),
    (CHAT, image("ftp://x/y.png"), None, "begins with ftp://"),
    (CHAT, image("/etc/passwd"), None, "local files"),
    (CHAT, image("http://[x"), None, "malformed"),
    (CHAT, image("data:image/png;base64,AAAA"), "messages", "image"),
    (CHAT, image(""), "messages", "empty"),
    (CHAT, chat(temperature=-1), "temperature", "between"),
    (CHAT, chat(temperature="warm"), "temperature", "number"),
    (CHAT, chat(top_p=1.5), "top_p", "between"),
    (CHAT, chat(top_k=-2), "top_k", "at least"),
    (CHAT, chat(seed=2**70), "seed", "64-bit"),
    (CHAT, chat(max_tokens=0), "max_tokens", "at least 1"),
    (CHAT, chat(max_tokens=10**9), "messages", "at most"),
    (CHAT, chat(stop=["x"] * 17), "stop", "at most 16"),
    (CHAT, chat(stop=""), "stop", "not empty"),
    (CHAT, chat(stop=7), "stop.str", "string"),
    (CHAT, chat(n=0), "n", "between"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "between 0 and 20"),
    (CHAT, chat(top_logprobs=2), "top_logprobs", "logprobs=true"),
    (CHAT, chat(presence_penalty=3), "presence_penalty", "between"),
    (CHAT, chat(min_p=2), "min_p", "between"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias", "token ids"),
    (CHAT, chat(logit_bias={"1": 101}), "logit_bias", "between"),
    (CHAT, chat(max_tokens=3, min_tokens=4), "min_tokens", "at most"),
    (CHAT, chat(response_format={"type": "xml"}), "response_format", "json_schema"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format", "'schema'"),
    (CHAT, chat(guided_json="{"), "guided_json", "no JSON"),
    (CHAT, chat(guided_json="[1]"), "guided_json", "an object"),
    (CHAT, chat(guided_json=7), "guided_json.str", "string"),
    (CHAT, chat(guided_choice=[]), "guided_choice", "at least one"),
    (CHAT, chat(guided_regex="a", guided_choice=["a"]), "guided_choice", "guided_regex and guided_choice"),
    (CHAT, chat(structured_outputs={"regex": 3}), "structured_outputs.regex", "must be a string"),
    (CHAT, chat(structured_outputs={"tag": "x"}), "structured_outputs.tag", "allowed: json, regex"),
    (CHAT, chat(structural_tag="x"), "structural_tag", "not supported"),
    (CHAT, chat(guided_regex="a", ignore_eos=True), "ignore_eos", "grammar"),
    (CHAT, chat(reasoning_max_tokens=-1), "reasoning_max_tokens", "at least 0"),
    (CHAT, chat(priority="high"), "priority", "integer"),
    (TEXT, text(best_of=2, n=3), "best_of", "at least n"),
    (TEXT, text(best_of=2, stream=True), "best_of", "stream=false"),
    (CHAT, chat(tools=[{"type": "function"}]), "messages", "function"),
    (CHAT, chat(tools={}), "tools", "list"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "has the tools []"),
    (CHAT, chat(tool_choice="always"), "tool_choice", "'required'"),
    (
        CHAT,
        chat(tool_choice={"type": "function", "function": {"name": "f"}}),
        "tool_choice",
        "has the tools []",
    ),
    (CHAT, chat(stream_options={"include_usage": True}), None, "stream=true"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), None, "messages"),
    (CHAT, chat(chat_template_kwargs={"open_picture": 1}), None, "open_picture"),
    (CHAT, chat(chat_template_kwargs={"add_generation_prompt": False}), None, "add_generation_prompt"),
    (CHAT, said(content="x" * 3000), "messages", "too long"),
    (TEXT, {}, "prompt", "required"),
    (TEXT, text(prompt=""), None, "at least one token"),
    (TEXT, text(prompt=[]), None, "empty"),
    (TEXT, text(prompt=["x", ""]), None, "at least one token"),
    (TEXT, text(prompt=[[]]), None, "at least one token"),
    (TEXT, text(prompt=["x", 3]), "prompt", "expected a string"),
    (TEXT, text(prompt=[-1]), "prompt", "expected a string"),
    (TEXT, text(prompt=[True]), "prompt", "expected a string"),
    (TEXT, text(prompt=[10**12]), None, "vocabulary"),
    (TEXT, text(prompt=[5]), None, "picture placeholders"),
    (TEXT, text(prompt="x" * 3000), "prompt", "3000 tokens"),
    (TEXT, text(logprobs=21), "logprobs", "between"),
    (TEXT, text(max_tokens=0), "max_tokens", "at least 1"),
    (TEXT, text(suffix="y"), "suffix", "not supported"),
    (TOKENIZE, {}, None, "either"),
    (TOKENIZE, {"prompt": "x", "messages": [USER]}, None, "either"),
    (TOKENIZE, {"messages": []}, None, "empty"),
    (TOKENIZE, {"prompt": 3}, "prompt", "string"),
    (DETOKENIZE, {}, "tokens", "required"),
    (DETOKENIZE, {"tokens": [-1]}, "tokens.0", "greater"),
    (DETOKENIZE, {"tokens": ["x"]}, "tokens.0", "integer"),
    (DETOKENIZE, {"tokens": [10**12]}, None, "vocabulary"),
]


@pytest.fixture(scope="module")
def http() -> TestClient:
    speaker = Speaker("yes", reads_pictures=True)
    return TestClient(create_app(speaker, Settings("tiny")), raise_server_exceptions=False)


def ids(value: object) -> str:
    return "" if isinstance(value, str | None) else json.dumps(value)[:60]


@pytest.mark.parametrize(("path", "body", "param", "words"), TABLE, ids=ids)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests(
    http: TestClient, path: str, body: object, param: str, words: str, stream: bool
) -> None:
    if stream and (path in (TOKENIZE, DETOKENIZE) or not isinstance(body, dict) or "stream_options" in body):
        pytest.skip("has no stream")
    sent = {**body, "stream": True} if stream else body
    response = http.post(path, content=json.dumps(sent), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = schemas.ErrorOut.model_validate(response.json()).error
    assert (error.type, error.param) == ("invalid_request_error", param)
    assert words in error.message
    assert http.post(TEXT, json=text()).json()["choices"][0]["text"] == "yes"


@pytest.mark.parametrize("path", [CHAT, TEXT, TOKENIZE, DETOKENIZE])
@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"null", b'"x"', b"[" * 3000, b"9" * 5000])
def test_bodies_that_are_no_object(http: TestClient, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert schemas.ErrorOut.model_validate(response.json()).error.message


def test_other_content_types_methods_and_paths(http: TestClient) -> None:
    wrong = [
        (http.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"}), 400),
        (http.get(CHAT), 405),
        (http.post("/v1/nothing", json={}), 404),
        (http.get("/v1/models/other"), 404),
    ]
    for response, status in wrong:
        assert response.status_code == status
        schemas.ErrorOut.model_validate(response.json())
    assert http.get(CHAT).headers["allow"] == "POST"


def test_answers_are_as_the_openapi_document_says(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    posts = {path: routes["post"] for path, routes in document["paths"].items() if "post" in routes}
    assert set(posts) == {CHAT, TEXT, TOKENIZE, DETOKENIZE, LOAD, UNLOAD}
    for path, route in posts.items():
        assert "$ref" in route["requestBody"]["content"]["application/json"]["schema"]
        kind = "text/plain" if path in (LOAD, UNLOAD) else "application/json"
        assert route["responses"]["200"]["content"][kind]["schema"]
        assert route["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorOut")
        assert "422" not in route["responses"]
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert "assistant" in properties["messages"]["items"]["properties"]["role"]["enum"]
    for path, body, schema in [
        (CHAT, chat(), schemas.ChatCompletion),
        (TEXT, text(), schemas.TextCompletion),
        (TOKENIZE, {"prompt": "x"}, schemas.Tokens),
        (DETOKENIZE, {"tokens": [65]}, schemas.Detokenized),
    ]:
        schema.model_validate(http.post(path, json=body).json())
