from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from ernietune.errors import RequestError
from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import ContextLengthError, Delta, SamplingParams, SettingError
from ernietune.text.messages import Conversation, Message, Part
from tests.fakes import (
    END,
    EOS,
    PLACEHOLDER,
    START,
    ByteTokenizer,
    PlainTemplate,
    ScriptedModel,
    engine,
    tokens,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=50)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen within 10 s"
        time.sleep(0.01)


def says(stream: Iterator[Delta], text: str) -> bool:
    """Whether the next delta with tokens has this text."""
    return next(delta for delta in stream if delta.ids).text == text


def ask(text: str, *pictures: str) -> Conversation:
    parts = [Part("image", url=url) for url in pictures] + [Part("text", text)]
    return Conversation((Message("user", tuple(parts)),))


def picture(_: str) -> Image.Image:
    return Image.new("RGB", (84, 56), "red")


def test_the_answer_ends_at_the_turn_end() -> None:
    spoken = engine("Paris.")
    completion = spoken.generate(spoken.prepare(ask("Capital?")), GREEDY)
    assert completion.text == "Paris."
    assert completion.finish_reason == "stop"
    assert completion.ids == (*tokens("Paris."), EOS)
    assert (completion.prompt_tokens, completion.completion_tokens) == (8, 7)


@pytest.mark.parametrize(("max_tokens", "text", "reason"), [(6, "Paris.", "length"), (7, "Paris.", "stop")])
def test_finish_reason_at_the_limit(max_tokens: int, text: str, reason: str) -> None:
    # The 7th token is the turn end: an answer that is complete was not cut off.
    spoken = engine("Paris.")
    completion = spoken.generate(
        spoken.prepare(ask("?")), SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )
    assert (completion.text, completion.finish_reason) == (text, reason)


def test_ignore_eos_goes_on() -> None:
    spoken = engine("ab")
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    completion = spoken.generate(spoken.prepare(ask("?")), params)
    assert (completion.text, completion.finish_reason) == ("ababab"[:6], "length")


def test_stop_ids_end_the_answer() -> None:
    spoken = engine("Paris.")
    params = SamplingParams(temperature=0.0, stop_ids=tuple(tokens("r")))
    assert spoken.generate(spoken.prepare(ask("?")), params).text == "Pa"


def test_deltas_are_whole_characters_and_never_a_stop_string() -> None:
    spoken = engine("北京。\nUser: more", end=False)
    params = SamplingParams(temperature=0.0, max_tokens=100, stop=("\nUser:",))
    deltas = list(spoken.stream(spoken.prepare(ask("?")), params))
    assert [delta.text for delta in deltas if delta.text] == ["北", "京", "。"]
    assert deltas[-1].finish_reason == "stop"
    assert sum(len(delta.ids) for delta in deltas) == len("北京。\nUser:".encode())


def test_held_text_comes_out_at_the_end() -> None:
    spoken = engine("a\nUser")
    params = SamplingParams(temperature=0.0, stop=("\nUser:",))
    assert spoken.generate(spoken.prepare(ask("?")), params).text == "a\nUser"


def test_a_prompt_without_room_for_an_answer_is_refused_with_numbers() -> None:
    spoken = engine(max_length=10)
    with pytest.raises(ContextLengthError, match="prompt has 10 tokens but the context holds 10"):
        spoken.prepare(ask("0123456789"))
    request = spoken.prepare(ask("012345678"))
    assert spoken.generate(request, SamplingParams(temperature=0.0)).text == "H"
    with pytest.raises(ContextLengthError, match="at most 1 can be generated"):
        spoken.stream(request, SamplingParams(max_tokens=2))


def test_a_text_model_refuses_pictures() -> None:
    with pytest.raises(RequestError, match="reads text only"):
        engine().prepare(ask("?", "red.png"), picture)


def test_a_placeholder_in_the_text_is_refused() -> None:
    spoken = engine(is_vl=True)
    spoken.template.render = lambda *_, **__: type("R", (), {"ids": [PLACEHOLDER, 20], "media": []})()
    with pytest.raises(RequestError, match="1 picture placeholders for pictures of 0 tokens"):
        spoken.prepare(ask("?"))


def test_pictures_get_routing_positions_and_pixels() -> None:
    spoken = engine(is_vl=True)
    request = spoken.prepare(ask("?", "red.png"), picture)
    # 84 x 56 pixels are 4 rows of 6 patches, 2 x 3 tokens, with a start and an end around them.
    assert request.ids.tolist() == [START] + [PLACEHOLDER] * 6 + [END] + tokens("?")
    assert request.grids == ((1, 4, 6),)
    assert request.patches is not None
    assert request.patches.shape == (24, 588)
    assert request.patches.dtype == np.float32
    assert request.is_vision is not None
    assert request.is_vision.tolist() == [True] * 8 + [False]
    assert request.positions[:, 2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert request.next_position == 6


def test_pixels_are_read_once_and_positions_go_on_after_the_largest() -> None:
    spoken = engine("abc", is_vl=True)
    request = spoken.prepare(ask("?", "red.png"), picture)
    spoken.generate(request, GREEDY)
    prefill, *steps = spoken.model.seen
    assert prefill.patches is not None
    assert prefill.grids == ((1, 4, 6),)
    assert all(step.patches is None and step.grids == () for step in steps)
    assert [step.positions.numpy().tolist() for step in steps] == [[[p] * 3] for p in (6, 7, 8)]
    assert [step.is_vision.numpy().tolist() for step in steps] == [[False]] * 3


def test_template_options_reach_the_template() -> None:
    spoken = engine()
    spoken.prepare(ask("?"), enable_thinking=True)
    assert spoken.template.options == {"enable_thinking": True}


def test_answers_grow_side_by_side() -> None:
    spoken = engine("endless", end=False)
    request = spoken.prepare(ask("?"))
    first, second = (spoken.stream(request, GREEDY) for _ in range(2))
    assert next(first).text == "e"
    assert says(second, "e")
    assert says(first, "n")
    for stream in (first, second):
        stream.close()
    wait_until(lambda: spoken.stats().running == 0)
    assert spoken.stats().free_blocks == spoken.stats().blocks


def test_closing_a_stream_lets_the_next_one_run() -> None:
    spoken = engine("endless", end=False, max_sequences=1)
    request = spoken.prepare(ask("?"))
    first = spoken.stream(request, SamplingParams(temperature=0.0))
    assert next(first).text == "e"
    waiting = spoken.stream(request, GREEDY)
    assert next(waiting).ids == ()  # not its turn
    first.close()
    assert says(waiting, "e")
    waiting.close()


def test_a_waiting_request_can_leave_the_queue() -> None:
    spoken = engine("endless", end=False, max_sequences=1)
    request = spoken.prepare(ask("?"))
    first, second, third = (spoken.stream(request, SamplingParams(temperature=0.0)) for _ in range(3))
    assert next(first).ids
    assert not next(second).ids
    assert not next(third).ids
    second.close()
    first.close()
    assert says(third, "e")
    third.close()


def test_requests_from_threads_are_served_in_order_and_whole() -> None:
    spoken = engine("one answer")
    request = spoken.prepare(ask("?"))
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(spoken.generate(request, GREEDY).text))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == ["one answer"] * 4


def test_min_tokens_holds_off_end_tokens_and_stop_strings() -> None:
    spoken = engine("abab")
    params = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=20, stop=("b",))
    answer = spoken.generate(spoken.prepare(ask("?")), params)
    assert (answer.text, answer.finish_reason, len(answer.ids)) == ("aba", "stop", 4)
    longer = SamplingParams(temperature=0.0, min_tokens=6, max_tokens=20)
    assert len(spoken.generate(spoken.prepare(ask("?")), longer).ids) > 6


def test_a_stop_string_may_be_kept() -> None:
    spoken = engine("Yes.\nUser: no")
    params = SamplingParams(temperature=0.0, stop=("\nUser:",), include_stop=True)
    assert spoken.generate(spoken.prepare(ask("?")), params).text == "Yes.\nUser:"


def test_bad_words_are_found_with_and_without_a_space() -> None:
    spoken = engine("Oh my")
    assert spoken.bad_words(["my", " my"]) == (tuple(tokens("my")), tuple(tokens(" my")))
    params = SamplingParams(temperature=0.0, max_tokens=5, bad_words=spoken.bad_words(["my"]))
    assert "my" not in spoken.generate(spoken.prepare(ask("?")), params).text


def test_all_choices_and_the_choice_of_one() -> None:
    spoken = engine("Hi")
    request = spoken.prepare(ask("?"))
    choices = spoken.generate_all(request, SamplingParams(temperature=0.0, n=3))
    assert [(choice.index, choice.text) for choice in choices] == [(0, "Hi"), (1, "Hi"), (2, "Hi")]
    with pytest.raises(SettingError, match="n is 3; use generate_all"):
        spoken.generate(request, SamplingParams(n=3))


def test_ids_as_a_prompt_are_checked() -> None:
    spoken = engine("Hi", is_vl=True)
    assert spoken.generate(spoken.prepare_ids(tokens("ab")), GREEDY).text == "Hi"
    for ids in ([], [-1], [10**6]):
        with pytest.raises(RequestError, match="at least one token id, all between 0 and 265"):
            spoken.prepare_ids(ids)
    with pytest.raises(RequestError, match="placeholder"):
        spoken.prepare_ids([PLACEHOLDER])


def test_settings_are_checked_before_anything_runs() -> None:
    spoken = engine("Hi", max_length=10)
    request = spoken.prepare(ask("?"))
    with pytest.raises(SettingError, match="min_tokens is 12; there is room for 9"):
        spoken.stream(request, SamplingParams(min_tokens=12))
    with pytest.raises(SettingError, match="stop_ids"):
        spoken.stream(request, SamplingParams(stop_ids=(10**6,)))
    assert spoken.stats().steps == 0


def test_a_context_that_the_cache_cannot_hold_is_refused() -> None:
    options = EngineOptions(cache_tokens=64)
    parts = (ScriptedModel([EOS]), ByteTokenizer(), PlainTemplate())
    with pytest.raises(RequestError, match="100 tokens does not fit into a cache of 64"):
        Engine(*parts, max_length=100, options=options)
    assert Engine(*parts, options=options).max_length == 64


def test_an_error_of_one_request_does_not_reach_its_neighbours() -> None:
    spoken = engine("a long answer")
    request = spoken.prepare(ask("?"))
    neighbour = spoken.stream(request, GREEDY)
    assert says(neighbour, "a")
    impossible = SamplingParams(allowed_ids=(20,), bad_words=((20,),), n=2)
    with pytest.raises(RequestError, match="forbid every one"):
        spoken.generate_all(request, impossible)
    assert "".join(delta.text for delta in neighbour) == " long answer"
    assert spoken.stats().free_blocks == spoken.stats().blocks


def test_a_failing_step_is_told_to_everybody_and_the_next_request_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    spoken = engine("Hi")
    request = spoken.prepare(ask("?"))
    logits, spoken.model.logits = spoken.model.logits, None
    with pytest.raises(TypeError):
        spoken.generate(request, GREEDY)
    spoken.model.logits = logits
    assert spoken.generate(request, GREEDY).text == "Hi"
    assert spoken.stats().free_blocks == spoken.stats().blocks
    wait_until(lambda: len(shown) == 1)  # the traceback is for the log


def test_cancelling_frees_the_blocks_before_the_next_step() -> None:
    spoken = engine("endless", end=False)
    spoken.model.stepwise = True
    request = spoken.prepare(ask("?"))
    arrived: list[Delta] = []
    run = spoken.run(request, SamplingParams(temperature=0.0), arrived.append)
    run.start()
    for _ in range(2):
        spoken.model.steps.release()
    wait_until(lambda: len(arrived) == 2)
    run.cancel()  # while the third step is under way
    assert spoken.stats().running == 1
    spoken.model.steps.release()
    wait_until(lambda: spoken.stats().running == 0)
    assert len(spoken.model.seen) <= 3
    assert spoken.stats().free_blocks == spoken.stats().blocks
    run.cancel()  # again: nothing happens


def test_the_urgent_go_first() -> None:
    spoken = engine("x", max_sequences=1)
    spoken.model.stepwise = True
    request = spoken.prepare(ask("?"))
    order: list[str] = []

    def note(name: str) -> Callable[[Delta | BaseException], None]:
        return lambda delta: order.append(name) if delta.finish_reason else None

    for name, priority in (("first", 0), ("late", 1), ("second", 0), ("urgent", -1)):
        spoken.run(request, GREEDY, note(name), priority).start()
    for _ in range(20):
        spoken.model.steps.release()
    wait_until(lambda: len(order) == 4)
    assert order[-1] == "late"
    assert order.index("urgent") < order.index("second")
    assert order.index("first") < order.index("second") < order.index("late")


def test_closing_ends_what_runs_and_a_later_request_starts_again() -> None:
    spoken = engine("endless", end=False)
    request = spoken.prepare(ask("?"))
    endless = spoken.stream(request, SamplingParams(temperature=0.0))
    assert next(endless).text == "e"
    spoken.close()
    with pytest.raises(RequestError, match="closed before the answer was complete"):
        list(endless)
    assert spoken.stats().free_blocks == spoken.stats().blocks
    spoken.close()
    assert spoken.generate(request, SamplingParams(temperature=0.0, max_tokens=3)).text == "end"


def test_a_program_may_end_while_answers_are_under_way() -> None:
    script = (
        "from ernietune.infer.request import SamplingParams\nfrom tests.fakes import engine\n"
        "spoken = engine('endless', end=False, max_length=4000)\nrequest = spoken.prepare_ids([20])\n"
        "stream = spoken.stream(request, SamplingParams(temperature=0.0))\nnext(stream)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
