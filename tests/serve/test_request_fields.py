"""Every field that clients of FastDeploy, vLLM and OpenAI send is honoured, refused by name, or harmless.

The names are those of the servers' own request classes (FastDeploy 2.x, vLLM 0.33).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from fastapi.testclient import TestClient

from ernietune import cli
from ernietune.serve.api import create_app
from ernietune.serve.options import Settings
from ernietune.serve.unsupported import UNSUPPORTED
from tests.serve.speaker import Speaker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# field -> (value, attribute of the engine's settings, its value)
SAMPLING = {
    "temperature": (0.3, "temperature", 0.3),
    "top_p": (0.4, "top_p", 0.4),
    "top_k": (7, "top_k", 7),
    "min_p": (0.2, "min_p", 0.2),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "presence_penalty": (-0.5, "presence_penalty", -0.5),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "seed": (11, "seed", 11),
    "n": (2, "n", 2),
    "stop": (["a", "b"], "stop", ("a", "b")),
    "stop_token_ids": ([4, 5], "stop_ids", (4, 5)),
    "include_stop_str_in_output": (True, "include_stop", True),
    "min_tokens": (3, "min_tokens", 3),
    "max_tokens": (9, "max_tokens", 9),
    "bad_words": (["no"], "bad_words", ((110, 111),)),
    "bad_words_token_ids": ([7, 8], "bad_words", ((7,), (8,))),
    "logit_bias": ({"5": 2}, "logit_bias", ((5, 2.0),)),
    "allowed_token_ids": ([5, 6], "allowed_ids", (5, 6)),
    "ignore_eos": (True, "ignore_eos", True),
}
ONLY_CHAT = {"max_completion_tokens": (9, "max_tokens", 9)}
# Those that show elsewhere; each has a test below, or the one named.
ELSEWHERE = {
    "messages": "test_api.py",
    "prompt": "test_openai_client.py",
    "model": "test_lora_routes.py",
    "tools": "test_openai_client.py",
    "tool_choice": "test_guided_api.py",
    "parallel_tool_calls": "test_openai_client.py",
    "stream": "test_api.py",
    "stream_options": "test_api.py",
    "logprobs": "test_openai_client.py",
    "top_logprobs": "test_openai_client.py",
    "echo": "test_openai_client.py",
    "best_of": "test_guided_api.py",
    "chat_template_kwargs": "test_openai_client.py",
    "metadata": "test_openai_client.py",
    "priority": "here",
    "cache_salt": "here",
    "request_id": "here",
    "return_tokens_as_token_ids": "here",
    "guided_json": "test_guided_api.py",
    "guided_regex": "test_guided_api.py",
    "guided_choice": "test_guided_api.py",
    "guided_grammar": "test_guided_api.py",
    "structured_outputs": "test_guided_api.py",
    "reasoning_max_tokens": "test_guided_api.py",
    "thinking_token_budget": "test_guided_api.py",
    "response_format": "test_guided_api.py",
}
# field -> (a value that would change the answer, one that asks for nothing)
REFUSED = {
    "prompt_logprobs": (2, False),
    "temp_scaled_logprobs": (True, False),
    "top_p_normalized_logprobs": (True, False),
    "include_draft_logprobs": (True, False),
    "structural_tag": ("x", None),
    "logits_processors_args": ({"thinking_budget": 5}, {}),
    "chat_template": ("{{ messages }}", None),
    "disable_chat_template": (True, False),
    "response_max_tokens": (5, None),
    "return_token_ids": (True, False),
    "prompt_token_ids": ([1], None),
    "completion_token_ids": ([1], None),
    "suffix": ("end", ""),
    "reasoning_effort": ("low", None),
    "truncate_prompt_tokens": (5, None),
    "continue_final_message": (True, False),
    "add_generation_prompt": (False, True),
    "documents": ([{"text": "x"}], []),
    "return_prompt_text": (True, False),
    "skip_special_tokens": (False, True),
    "use_beam_search": (True, False),
    "mm_processor_kwargs": ({"max_pixels": 9}, {}),
}
HARMLESS = {
    "user": "me",
    "max_streaming_response_tokens": 4,
    "mm_hashes": ["x"],
    "collect_metrics": True,
    "store": False,
    "service_tier": "auto",
}
# What both servers know, so that none is forgotten.
NAMES = """
messages tools model temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty
seed n stop stop_token_ids include_stop_str_in_output min_tokens max_tokens max_completion_tokens stream
stream_options logprobs top_logprobs prompt_logprobs temp_scaled_logprobs top_p_normalized_logprobs
include_draft_logprobs user metadata response_format guided_json guided_regex guided_choice
guided_grammar structural_tag bad_words bad_words_token_ids logits_processors_args chat_template_kwargs
chat_template disable_chat_template reasoning_max_tokens response_max_tokens request_id return_token_ids
prompt_token_ids completion_token_ids max_streaming_response_tokens mm_hashes collect_metrics prompt
best_of echo suffix logit_bias tool_choice parallel_tool_calls reasoning_effort thinking_token_budget
ignore_eos truncate_prompt_tokens allowed_token_ids continue_final_message add_generation_prompt
documents structured_outputs return_tokens_as_token_ids return_prompt_text priority cache_salt
"""


@pytest.fixture
def speaker() -> Speaker:
    return Speaker("yes", thinks=False)


@pytest.fixture
def http(speaker: Speaker) -> TestClient:
    return TestClient(create_app(speaker, Settings("tiny")), raise_server_exceptions=False)  # type: ignore[arg-type]


def ask(http: TestClient, path: str, **fields: object):  # type: ignore[no-untyped-def]
    own = {"messages": [{"role": "user", "content": "?"}]} if path == CHAT else {"prompt": "x"}
    return http.post(path, json=own | fields)


def test_no_name_is_left_out() -> None:
    tables = [*SAMPLING, *ONLY_CHAT, *ELSEWHERE, *REFUSED, *HARMLESS]
    assert len(tables) == len(set(tables))
    assert set(NAMES.split()) - set(tables) == set()


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("field", [*SAMPLING, *ONLY_CHAT])
def test_honoured(http: TestClient, speaker: Speaker, path: str, field: str) -> None:
    if path == TEXT and field in ONLY_CHAT:
        pytest.skip("is a field of chats")
    value, attribute, expected = (SAMPLING | ONLY_CHAT)[field]
    assert ask(http, path, **{field: value}).status_code == 200
    assert getattr(speaker.params[-1], attribute) == expected
    assert ask(http, path, **{field: None}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(http: TestClient, path: str, field: str) -> None:
    value, nothing = REFUSED[field]
    response = ask(http, path, **{field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert ask(http, path, **{field: nothing}).status_code == 200
    assert ask(http, path, **{field: None}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("field", HARMLESS)
def test_without_an_effect_on_answers(http: TestClient, speaker: Speaker, path: str, field: str) -> None:
    plain = ask(http, path).json()["choices"]
    assert ask(http, path, **{field: HARMLESS[field]}).json()["choices"] == plain
    assert speaker.params[-1] == speaker.params[-2]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_of_the_request_itself(http: TestClient, speaker: Speaker, path: str) -> None:
    answer = ask(http, path, request_id="mine", priority=-3, cache_salt="s").json()
    assert answer["id"] == ("chatcmpl-mine" if path == CHAT else "cmpl-mine")
    request, priority = speaker.streamed
    assert (request.cache_salt, priority) == ("s", -3)
    assert ask(http, path, request_id="").status_code == 400


@pytest.mark.parametrize(
    ("path", "field", "value", "hint"),
    [
        (CHAT, "temprature", 0, "did you mean 'temperature'?"),
        (TEXT, "max_new_tokens", 5, "did you mean 'max_tokens'?"),
        (CHAT, "topK", 1, "did you mean 'top_k'?"),
        (TEXT, "top-p", 0.5, "did you mean 'top_p'?"),
        (CHAT, "reasoning_efort", "low", "did you mean 'reasoning_effort'?"),
        (CHAT, "echo", True, "it belongs to requests of the other kind"),
        (CHAT, "best_of", 3, "it belongs to requests of the other kind"),
        (TEXT, "max_completion_tokens", 3, "it belongs to requests of the other kind"),
        (TEXT, "tools", [TOOL], "it belongs to requests of the other kind"),
    ],
)
def test_a_slip_is_not_ignored(http: TestClient, path: str, field: str, value: object, hint: str) -> None:
    response = ask(http, path, **{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert hint in response.json()["error"]["message"]
    assert ask(http, path, **{field: None}).status_code == 200


def test_what_nobody_knows_is_named_once_in_the_log(
    http: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert ask(http, CHAT, session="5", echo=False).status_code == 200
    assert [record.getMessage() for record in caplog.records if "session" in record.getMessage()] == [
        "requests bring the field 'session', which has no effect here"
    ]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"temperature": "0.5"}, "temperature"),
        (CHAT, {"temperature": True}, "temperature"),
        (CHAT, {"max_tokens": True}, "max_tokens"),
        (TEXT, {"max_tokens": "8"}, "max_tokens"),
        (TEXT, {"max_tokens": 8.5}, "max_tokens"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"stream": "no"}, "stream"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (TEXT, {"stop_token_ids": [True]}, "stop_token_ids.0"),
        (TEXT, {"allowed_token_ids": []}, "allowed_token_ids"),
        (CHAT, {"bad_words": [""]}, "bad_words"),
        (TEXT, {"prompt": [10**20]}, "prompt"),
    ],
)
def test_another_type_is_refused_and_not_read_as_its_like(
    http: TestClient, path: str, fields: dict[str, object], param: str
) -> None:
    response = ask(http, path, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_whole_numbers_may_have_a_point(http: TestClient, speaker: Speaker) -> None:
    assert ask(http, TEXT, max_tokens=8.0, n=1.0, temperature=1).status_code == 200
    assert (speaker.params[-1].max_tokens, speaker.params[-1].n) == (8, 1)


def test_tokens_by_their_ids(http: TestClient) -> None:
    fields = {"return_tokens_as_token_ids": True, "top_logprobs": 1, "logprobs": True}
    first = ask(http, CHAT, **fields).json()["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("token_id:121", [121])
    assert first["top_logprobs"][0]["token"] == "token_id:121"
    text = ask(http, TEXT, return_tokens_as_token_ids=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert text["tokens"][0] == "token_id:121"
    assert text["top_logprobs"][0] == {"token_id:121": -121.0}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (TEXT, {"allowed_token_ids": [10**9]}, "allowed_token_ids"),
        (TEXT, {"logprobs": 21, "echo": True}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"bad_words_token_ids": [10**9]}, "bad_words_token_ids"),
    ],
)
def test_errors_use_the_names_of_the_request(path: str, fields: dict, param: str) -> None:
    from tests.fakes import engine

    http = TestClient(create_app(engine("yes"), Settings("tiny")), raise_server_exceptions=False)
    own = {"messages": [{"role": "user", "content": "?"}]} if path == CHAT else {"prompt": [11]}
    response = http.post(path, json=own | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} is ")


def test_the_page_about_serving_names_them_all() -> None:
    """Flags, routes and fields, each where it belongs."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    flags = [name for option in command.params for name in option.opts if name.startswith("--")]
    assert [flag for flag in flags if f"`{flag}" not in page] == []
    document = create_app(Speaker(), Settings("tiny")).openapi()  # type: ignore[arg-type]
    assert [path for path in document["paths"] if f"{path}`" not in page] == []
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    for row, fields in (
        ("honoured", [*SAMPLING, *ONLY_CHAT, *ELSEWHERE]),
        ("refused, 400", [*REFUSED, *UNSUPPORTED]),
        ("without effect on answers", [*HARMLESS]),
    ):
        assert [field for field in fields if f"`{field}`" not in rows[row]] == []
