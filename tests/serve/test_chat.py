from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

from PIL import Image

from ernietune.infer.request import SamplingParams
from ernietune.media.video import VideoLimits
from ernietune.serve.chat import chat
from ernietune.serve.local import LocalSpeaker
from ernietune.serve.options import Settings
from ernietune.serve.wire import RemoteSpeaker
from ernietune.text.parse import ParserChoice
from tests.fakes import engine
from tests.serve.speaker import Speaker, served

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def talk(spoken, *lines: object, parsers: ParserChoice | None = None) -> str:
    """Everything the chat with an engine prints for these lines."""
    return say(LocalSpeaker(spoken, GREEDY, parsers or ParserChoice()), *lines)


def say(speaker, *lines: object) -> str:
    """Everything the chat prints for these lines; an exception among them is raised at the prompt."""
    waiting = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out = io.StringIO()
    chat(speaker, read=read, out=out)
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


def test_videos_go_with_the_next_message(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (56, 56), color) for color in ("red", "blue")]
    path = tmp_path / "a clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    spoken = engine("red", is_vl=True)
    spoken.video = VideoLimits(min_pixels=3136, max_pixels=3136)
    printed = talk(
        spoken, f"/video {path}", "Colour?", f"/video {tmp_path}/none.mp4", f"/save {tmp_path}/saved.json"
    )
    assert "Video a clip.gif goes with" in printed
    assert "error: video" in printed
    assert spoken.model.seen[0].grids == ((2, 4, 4),)
    assert "Video a clip.gif" in talk(spoken, str(path))  # it moves
    (part, _) = json.loads((tmp_path / "saved.json").read_text())["messages"][0]["content"]
    assert part == {"type": "video_url", "video_url": {"url": str(path)}}


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


THINKS = ParserChoice.of(None, None, "vl_thinking")


def test_thoughts_are_dimmed_on_a_terminal() -> None:
    speaker, out = LocalSpeaker(Speaker("Hm.\n</think>\n\nYes."), GREEDY, THINKS), Terminal()
    lines = iter(["?", "exit"])
    chat(speaker, read=lambda _: next(lines), out=out)
    printed = out.getvalue().replace("\x1b[0m\x1b[2m", "")
    assert "\x1b[2mHm.\x1b[0m\n\nYes.\n" in printed


def test_thoughts_are_not_read_again() -> None:
    spoken = Speaker("Hm.</think>Yes.")
    printed = talk(spoken, "one?", "two?", parsers=THINKS)
    assert "Hm.\n\nYes.\n" in printed
    _, first, _ = spoken.conversation.messages
    assert (first.text, first.reasoning) == ("Yes.", None)


def test_the_system_message_can_change() -> None:
    spoken = Speaker("Yes.", thinks=False)
    talk(spoken, "one?", "/system Be brief.", "two?")
    assert [message.role for message in spoken.conversation.messages] == [
        "system",
        *["user", "assistant"],
        "user",
    ]
    assert spoken.conversation.messages[0].text == "Be brief."
    talk(spoken, "/system Be brief.", "one?", "/system", "two?", "quit", "three?")
    assert [message.text for message in spoken.conversation.messages] == ["one?", "Yes.", "two?"]


def test_a_conversation_can_be_saved_and_loaded(tmp_path: Path) -> None:
    picture, file = tmp_path / "red.png", tmp_path / "talk.jsonl"
    Image.new("RGB", (56, 56), "red").save(picture)
    spoken = Speaker("Hm.</think>Red.", reads_pictures=True)
    printed = talk(spoken, "/system Look.", f"/image {picture}", "Colour?", f"/save {file}", parsers=THINKS)
    assert "Saved 2 messages" in printed
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][2] == {"role": "assistant", "content": "Red.", "reasoning_content": "Hm."}

    again = Speaker("Hm.</think>Still red.", reads_pictures=True)
    printed = talk(again, f"/load {file}", "Sure?", f"/save {file}", parsers=THINKS)
    assert "Loaded 2 messages" in printed
    assert "error: " + str(file) + " exists already" in printed
    assert again.conversation.images == [str(picture)]
    assert [m.text for m in again.conversation.messages] == ["Look.", "Colour?", "Red.", "Sure?"]


def test_files_that_are_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"messages": []}')
    printed = talk(
        Speaker(), f"/load {tmp_path}/none", f"/load {tmp_path}/x.json", f"/save {tmp_path}/no/where"
    )
    assert printed.count("error: ") == 3


def test_a_server_is_asked_by_its_url(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    spoken = Speaker("Hm.</think>Yes.", reads_pictures=True)
    with served(spoken, Settings("tiny", THINKS, api_keys=("k",))) as url:
        printed = say(
            RemoteSpeaker(url, thinking=True, api_key="k"), str(tmp_path / "red.png"), "one?", "two?"
        )
        assert printed.count("Hm.\n\nYes.\n") == 2
        assert spoken.options == {"enable_thinking": True}
        first, second, _ = spoken.conversation.messages
        assert first.parts[0].url.startswith("data:image/png;base64,")
        assert (second.text, second.reasoning) == ("Yes.", None)
        assert "API keys" in say(RemoteSpeaker(url + "/v1"), "one?")
        assert "too long" in say(RemoteSpeaker(url, api_key="k"), "x" * 3000)
    assert "is the server running?" in say(RemoteSpeaker(url), "one?")


def test_thoughts_can_be_folded_and_shown_after_all() -> None:
    spoken = Speaker("Hm. Well.</think>Yes.")
    printed = talk(spoken, "/think", "one?", "/think", "two?", parsers=THINKS)
    assert "[a thought of 2 words; /think shows it]\n\nYes.\n" in printed
    assert "shown from now on.\nHm. Well.\n" in printed
    assert printed.endswith("Hm. Well.\n\nYes.\n")


def test_commands_are_listed_and_unknown_ones_named() -> None:
    printed = talk(
        engine("Yes."), "/help", "/foo", "/tools", "/etc/passwd?", "/history", "/clear", "/history"
    )
    assert "/save FILE" in printed
    assert "There is no command /foo" in printed
    assert "start the chat with --tools" in printed
    assert "user: /etc/passwd?\nassistant: Yes.\nThe conversation is empty again.\n" in printed


def test_leaving_words() -> None:
    for word in ("exit", "quit", "/exit", "/quit"):
        assert "Yes." not in talk(engine("Yes."), word, "one?")
