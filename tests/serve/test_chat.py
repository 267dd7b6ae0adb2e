from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

from PIL import Image

from ernietune.infer.request import SamplingParams
from ernietune.serve.chat import chat
from tests.fakes import engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def talk(spoken, *lines: object) -> str:
    """Everything the chat prints for these lines; an exception among them is raised at the prompt."""
    waiting = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out = io.StringIO()
    chat(spoken, GREEDY, read=read, out=out)
    return out.getvalue()


def prompts(spoken) -> list[int]:
    """Prompt lengths of the answers so far."""
    return [inputs.ids.shape[0] for inputs in spoken.model.seen if inputs.ids.shape[0] > 1]


def test_answers_and_remembers_until_cleared() -> None:
    spoken = engine("Yes.")
    printed = talk(spoken, "one?", "two?", "clear", "three?", "exit", "never read")
    assert printed.count("Yes.\n") == 3
    assert "empty again" in printed
    # one?, then one? + Yes. + two?, then three? alone.
    assert prompts(spoken) == [4, 12, 6]


def test_the_greeting_documents_pictures_only_where_they_are_read() -> None:
    assert "`exit`" in talk(engine())
    assert "/image PATH" in talk(engine(is_vl=True))
    assert "/image" not in talk(engine())


def test_pictures_go_with_the_next_message(tmp_path: Path) -> None:
    path = tmp_path / "a red.png"
    Image.new("RGB", (56, 56), "red").save(path)
    spoken = engine("red", is_vl=True)
    printed = talk(spoken, f"/image {path}", str(path), "Colour?")
    assert printed.count("Picture a red.png (56 x 56)") == 2
    assert spoken.model.seen[0].ids.shape[0] == 2 * 6 + 7  # a start, four tokens and an end each
    assert spoken.model.seen[0].grids == ((1, 4, 4),)  # it is the same picture: looked at once


def test_a_missing_picture_is_reported_at_once(tmp_path: Path) -> None:
    spoken = engine("Yes.", is_vl=True)
    printed = talk(spoken, f"/image {tmp_path}/none.png", "Still there?")
    assert "error: " in printed
    assert "none.png" in printed
    assert spoken.model.seen[0].grids == ()


def test_a_text_model_says_that_it_cannot_see() -> None:
    assert "reads text only" in talk(engine(), "/image x.png")


def test_an_overlong_message_leaves_the_conversation_as_it_was() -> None:
    spoken = engine("Yes.", max_length=60)
    printed = talk(spoken, "x" * 100, "one?")
    assert "error: the prompt has 100 tokens" in printed
    assert prompts(spoken) == [4]


def test_an_answer_at_the_limit_says_so() -> None:
    assert "[cut off" in talk(engine("ab" * 30), "go")


def test_interrupts_at_the_prompt_do_not_leave() -> None:
    assert "Yes." in talk(engine("Yes."), KeyboardInterrupt(), "", "one?")


def test_interrupting_an_answer_keeps_what_was_said() -> None:
    spoken = engine("Yes.")
    stream = spoken.stream

    def interrupted(*arguments):
        yield from islice((delta for delta in stream(*arguments) if delta.ids), 2)
        raise KeyboardInterrupt

    spoken.stream = interrupted
    printed = talk(spoken, "one?")
    assert "Ye [stopped]" in printed
    spoken.stream = stream
    assert "Yes.\n" in talk(spoken, "two?")  # the model is free again
