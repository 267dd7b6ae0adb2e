from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from ernietune.errors import ConfigError
from ernietune.media.video import VideoLimits
from ernietune.serve.api import create_app, listen
from ernietune.serve.options import Settings, media_counts
from tests.fakes import engine

ASK = [{"role": "user", "content": "Capital of France?"}]
ANSWER = "It's Paris: 巴黎 🙂."


def client(spoken=None, media_folder: Path | None = None) -> TestClient:
    return TestClient(
        create_app(spoken or engine(ANSWER), Settings("tiny", media_folder=media_folder)),
        raise_server_exceptions=False,
    )


def post(http: TestClient, **fields: object):
    return http.post("/v1/chat/completions", json={"messages": ASK, "temperature": 0, **fields})


def events(response) -> list[dict]:
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def picture_url(suffix: str = "png") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(buffer, suffix)
    return f"data:image/{suffix};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask_about(url: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Colour?"}]
    return [{"role": "user", "content": parts}]


def test_an_answer_in_one_piece() -> None:
    body = post(client()).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    assert abs(body["created"] - time.time()) < 60
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"
    count = len(ANSWER.encode()) + 1
    assert body["usage"] == {"prompt_tokens": 18, "completion_tokens": count, "total_tokens": 18 + count}


def test_a_stream_says_the_same_with_role_first_and_usage_last() -> None:
    http = client()
    response = post(http, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *middle, finish, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == ANSWER
    assert all("\ufffd" not in chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"] == post(http).json()["usage"]
    assert len({chunk["id"] for chunk in (first, *middle, finish, usage)}) == 1


def test_usage_is_sent_only_when_asked_for() -> None:
    assert all("usage" not in chunk for chunk in events(post(client(), stream=True)))


def test_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in events(post(client(engine("abc")), stream=True, stream_options=options))
    ]
    assert counts == [0, 1, 2, 3, 4, 4]


def test_stop_and_length() -> None:
    choice = post(client(), stop=" Paris").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It's", "stop")
    choice = post(client(), max_tokens=4).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It's", "length")


def test_models_and_health() -> None:
    http = client()
    assert http.get("/health").status_code == 200
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 1000)
    assert http.get("/v1/models/tiny").json() == card
    assert http.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 5}, "temperature", "between 0 and 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "wizard"),
        ({"n": 200}, "n", "between"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"max_tokens": 2000}, "messages", "2000"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages", "prompt has 1000 tokens"),
        ({"messages": ask_about(picture_url())}, None, "text only"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(fields: dict, param: str | None, words: str, stream: bool) -> None:
    if stream and "stream_options" in fields:
        pytest.skip("that one is about requests without a stream")
    http = client()
    response = post(http, stream=stream, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert post(http).status_code == 200  # and the next one works


def test_an_overlong_prompt_has_openais_code() -> None:
    error = post(client(), messages=[{"role": "user", "content": "x" * 2000}]).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", ["{", "", "[]", '"x"', "null"])
def test_bodies_that_are_no_request(body: str) -> None:
    response = client().post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_unknown_routes_and_methods_have_the_error_shape() -> None:
    http = client()
    missing, wrong = http.get("/v1/nothing"), http.get("/v1/chat/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_picture_as_data_url_is_read() -> None:
    spoken = engine("red", is_vl=True)
    response = post(client(spoken), messages=ask_about(picture_url()))
    assert response.json()["choices"][0]["message"]["content"] == "red"
    # One start, 2 x 2 tokens, one end and the question.
    assert response.json()["usage"]["prompt_tokens"] == 1 + 4 + 1 + len("Colour?")
    assert spoken.model.seen[0].grids == ((1, 4, 4),)


def test_an_unreadable_picture_is_a_400() -> None:
    response = post(client(engine(is_vl=True)), messages=ask_about("data:image/png;base64,AAAA"))
    assert response.status_code == 400


def test_local_pictures_need_a_media_folder_and_stay_inside_of_it(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for path in (media / "a b.png", tmp_path / "secret.png"):
        Image.new("RGB", (56, 56)).save(path)
    closed, opened = client(engine(is_vl=True)), client(engine(is_vl=True), media)

    def status(http: TestClient, url: str) -> int:
        return post(http, messages=ask_about(url)).status_code

    inside = [str(media / "a b.png"), f"file://{media}/a%20b.png", "a b.png"]
    outside = [str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "../secret.png", "/etc/passwd"]
    assert [status(opened, url) for url in inside] == [200] * 3
    assert [status(opened, url) for url in outside] == [400] * 4
    assert [status(closed, url) for url in inside] == [400] * 3


def video(**given: object) -> list[dict[str, object]]:
    parts = [{"type": "video_url", "video_url": given}, {"type": "text", "text": "Colour?"}]
    return [{"role": "user", "content": parts}]


def small_videos(is_vl: bool = True) -> object:
    spoken = engine(ANSWER, is_vl=is_vl)
    spoken.video = VideoLimits(min_pixels=3136, max_pixels=3136)
    return spoken


def test_videos_in_and_out_of_the_media_folder(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    frames = [Image.new("RGB", (56, 56), color) for color in ("red", "blue")]
    for folder in (media, tmp_path):
        frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
        frames[0].save(folder / "frame.png")
    closed, opened = client(small_videos()), client(small_videos(), media)

    def status(http: TestClient, **given: object) -> int:
        return post(http, messages=video(**given)).status_code

    data = "data:image/gif;base64," + base64.b64encode((media / "clip.gif").read_bytes()).decode()
    assert status(closed, url=data) == 200
    assert status(opened, url="clip.gif") == status(opened, frames=["frame.png", "frame.png"]) == 200
    assert status(opened, url="../clip.gif") == status(opened, frames=["frame.png", "../frame.png"]) == 400
    assert status(closed, url="clip.gif") == status(closed, frames=["frame.png"]) == 400
    assert status(opened, url="none.gif") == status(opened, url="frame.png") == 400
    assert status(client(small_videos(is_vl=False)), url=data) == 400


def test_a_limit_of_videos() -> None:
    settings = Settings("tiny", media=media_counts('{"image": 3, "video": 0}'))
    response = post(TestClient(create_app(small_videos(), settings)), messages=video(url="data:,"))
    assert response.status_code == 400
    assert "has 1 videos, but this server takes at most 0" in response.json()["error"]["message"]


def test_a_taken_port_is_explained() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def spoken():
    return engine(ANSWER)


@pytest.fixture
def url(spoken) -> Iterator[str]:
    """A real server on a free port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(spoken, Settings("tiny")), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    for _ in range(1000):
        spoken.model.steps.release()
    thread.join(10)


@pytest.fixture
def peer(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="null", max_retries=0)


def test_the_openai_client(peer: openai.OpenAI) -> None:
    assert [model.id for model in peer.models.list()] == ["tiny"]
    whole = peer.chat.completions.create(model="null", messages=ASK, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    stream = peer.chat.completions.create(
        model="any", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert chunks[-1].usage == whole.usage


def test_the_openai_client_raises_its_own_errors(peer: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        peer.chat.completions.create(model="x", messages=[{"role": "user", "content": "x" * 2000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        peer.embeddings.create(model="x", input="y")


def test_health_answers_while_a_generation_runs_and_hanging_up_frees_the_model(spoken, url: str) -> None:
    import httpx

    spoken.model.stepwise = True
    body = {"messages": ASK, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        for _ in range(3):
            spoken.model.steps.release()
        assert next(line for line in lines if '"content": "I"' in line)
        assert httpx.get(f"{url}/health", timeout=5).status_code == 200
    time.sleep(0.3)  # the server notices that the client is gone
    spoken.model.steps.release()
    for _ in range(100):
        time.sleep(0.05)
        if spoken.stats().running == 0:
            break
    assert spoken.stats().running == 0, "the request still runs"
    assert len(spoken.model.seen) < 10


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_while_waiting_is_forgotten(spoken, url: str, stream: bool) -> None:
    """The model is busy with another request, so nothing is ever sent to the one that leaves."""
    import httpx

    spoken.model.stepwise = True
    first = threading.Thread(
        target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": {"prompt": [11], "max_tokens": 2}}
    )
    first.start()
    waiting = {"prompt": [11, 12], "max_tokens": 3, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream("POST", f"{url}/v1/completions", json=waiting, timeout=1) as response:
            response.read()
    time.sleep(0.3)
    for _ in range(4):
        spoken.model.steps.release()
    first.join(10)
    for _ in range(100):
        time.sleep(0.02)
        if spoken.stats().waiting + spoken.stats().running == 0:
            break
    assert spoken.stats().waiting + spoken.stats().running == 0
    assert spoken.stats().generated_tokens <= 3  # two of the first; the other had at most begun
