from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ernietune.infer.text_stream import Detokenizer, StopStrings, TextStream, final_answer
from tests.fakes import ByteTokenizer, tokens


def emitted(pieces: list[str], stop: list[str], include: bool) -> tuple[str, bool]:
    stops = StopStrings(stop, include)
    text = "".join(stops.push(piece) for piece in pieces)
    return text + stops.finish(), stops.found


def cut_at_first(text: str, stop: list[str], include: bool) -> tuple[str, bool]:
    """The slow truth: read character by character until the text ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end if include else end - max(map(len, hits))], True
    return text, False


@given(
    text=st.text("ab\n", max_size=20),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=8),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_pieces(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert emitted(pieces, stop, include) == cut_at_first(text, stop, include)


def test_only_a_possible_beginning_is_held_back() -> None:
    stops = StopStrings(["\nUser:"])
    assert stops.push("Paris.\nUs") == "Paris."
    assert stops.push("ually") == "\nUsually"
    assert stops.push(" x\nUser") == " x"
    assert stops.push(": again") == ""
    assert stops.found
    assert stops.finish() == ""


@given(st.text(max_size=12))
def test_every_piece_is_whole_characters(text: str) -> None:
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(token) for token in tokens(text)]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = Detokenizer(ByteTokenizer())
    assert [stream.push(token) for token in tokens("é中🙂")] == ["", "é", "", "", "中", "", "", "", "🙂"]


def test_bytes_that_never_become_a_character_are_replaced_at_the_end() -> None:
    stream = Detokenizer(ByteTokenizer())
    assert [stream.push(token) for token in tokens("中".encode()[:2])] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_an_interrupted_character_does_not_swallow_the_next() -> None:
    stream = Detokenizer(ByteTokenizer())
    pieces = [stream.push(token) for token in tokens("中".encode()[:2] + b"ok")]
    assert "".join(pieces) == "\ufffdok"


@given(st.binary(max_size=16))
def test_pieces_join_to_the_text_decoded_at_once(data: bytes) -> None:
    stream = Detokenizer(ByteTokenizer())
    pieces = [stream.push(token) for token in tokens(data)]
    assert "".join(pieces) + stream.finish() == data.decode(errors="replace")


def test_a_stop_string_of_several_bytes_per_character_is_found() -> None:
    stream = TextStream(ByteTokenizer(), ["。"])
    pieces = [stream.push(token) for token in tokens("你好。再见")]
    assert "".join(pieces) == "你好"
    assert stream.stopped


def test_final_answer_drops_the_thought_and_its_tags() -> None:
    assert final_answer("It is red.\n</think>\n\n<response>\nRed\n</response>\n") == "Red"
    assert final_answer("<think>\n\n</think>\n\nRed") == "Red"
    assert final_answer(" Red ") == "Red"
