"""`data check` on 300 malformed records of 30 kinds, and on what is fine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernietune.config import build
from ernietune.data.build import processor_for
from ernietune.data.check import check, check_training, lines
from ernietune.data.dataset import Dataset, Encoder, Sample, Skipped, VisionTokens
from ernietune.data.sources import open_source
from ernietune.media.image import ImageLimits
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer
from tests.letters import picture
from tests.tiny_tokenizer import write_tokenizer

RED = picture("red")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


def messages() -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": RED}}
    return {
        "messages": [
            {"role": "user", "content": [image, {"type": "text", "text": "question"}]},
            {"role": "assistant", "content": "", "tool_calls": [copy.deepcopy(CALL)]},
            {"role": "tool", "content": "result"},
            {"role": "assistant", "content": "answer"},
        ],
        "tools": [copy.deepcopy(TOOL)],
    }


def erniekit() -> dict[str, Any]:
    return {"src": ["q1", "q2"], "tgt": ["a1", "a2"], "label": [1, 1]}


def text_info() -> dict[str, Any]:
    texts = [{"text": "q", "tag": "mask"}, {"text": "a", "tag": "no_mask"}]
    return {"text_info": texts, "image_info": [{"matched_text_index": 0, "image_url": RED}]}


def alpaca() -> dict[str, Any]:
    return {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}


def sharegpt() -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    return {"conversations": turns, "images": [RED]}


def preference() -> dict[str, Any]:
    answers = {name: {"role": "assistant", "content": name} for name in ("chosen", "rejected")}
    return {"messages": [{"role": "user", "content": "q"}], **answers}


def put(*way: str | int, value: Any) -> Callable[[dict[str, Any]], object]:
    """A change of a record: the value at `way` is another one."""

    def change(record: dict[str, Any]) -> object:
        owner: Any = record
        for step in way[:-1]:
            owner = owner[step]
        owner[way[-1]] = value
        return record

    return change


def without(*way: str | int) -> Callable[[dict[str, Any]], object]:
    """A change of a record: what is at `way` is gone."""

    def change(record: dict[str, Any]) -> object:
        owner: Any = record
        for step in way[:-1]:
            owner = owner[step]
        del owner[way[-1]]
        return record

    return change


# (good record, what breaks it, reason, field, a word of the explanation)
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], Any, str, str, str]] = {
    "broken JSON": (messages, '{"messages": [', "malformed", "", "not valid JSON"),
    "not an object": (messages, lambda r: [r], "malformed", "", "a list; expected an object"),
    "no messages": (messages, without("messages"), "malformed", "", "no 'messages'"),
    "unknown key": (messages, put("mesages", value=1), "malformed", "", "did you mean 'messages'"),
    "no role": (messages, without("messages", 0, "role"), "malformed", "messages[0]", "no 'role'"),
    "bad role": (messages, put("messages", 3, "role", value="bot"), "malformed", "messages[3].role", "'bot'"),
    "number": (
        messages,
        put("messages", 3, "content", value=7),
        "malformed",
        "messages[3].content",
        "number",
    ),
    "late system": (
        *(messages, put("messages", 3, value={"role": "system", "content": "s"})),
        *("malformed", "messages[3]", "only the first"),
    ),
    "bad part": (
        *(messages, put("messages", 0, "content", 1, "type", value="txt")),
        *("malformed", "messages[0].content[1].type", "'txt'"),
    ),
    "bad arguments": (
        *(messages, put("messages", 1, "tool_calls", 0, "function", "arguments", value="{")),
        *("malformed", "messages[1].tool_calls[0].function.arguments", "not valid JSON"),
    ),
    "bad tool": (
        messages,
        put("tools", 0, value={"type": "function"}),
        "malformed",
        "tools[0]",
        "'function'",
    ),
    "bad weight": (
        messages,
        put("messages", 3, "weight", value=-0.5),
        "malformed",
        "messages[3].weight",
        "-0.5",
    ),
    "weight as text": (messages, put("weight", value="2"), "malformed", "weight", "expected a number"),
    "weight of nothing": (messages, put("weight", value=0), "malformed", "weight", "leave it out of"),
    "short label": (messages, put("label", value=[1]), "malformed", "label", "2 assistant messages"),
    "video": (messages, put("videos", value=["a.mp4"]), "malformed", "videos", "0 places for one"),
    "bad video": (
        *(
            messages,
            put("messages", 0, "content", 0, value={"type": "video_url", "video_url": {"url": "a.mp4"}}),
        ),
        *("video", "", "video a.mp4: there is no file"),
    ),
    "bad rate": (
        messages,
        put("messages", 0, "content", 0, value={"type": "video_url", "video_url": {"url": "a", "fps": -1}}),
        *("malformed", "messages[0].content[0].video_url.fps", "is -1"),
    ),
    "no frames": (
        messages,
        put("messages", 0, "content", 0, value={"type": "video_url", "video_url": {"frames": []}}),
        *("malformed", "messages[0].content[0].video_url.frames", "is empty"),
    ),
    "url and frames": (
        messages,
        put(
            "messages",
            0,
            "content",
            0,
            value={"type": "video_url", "video_url": {"url": "a", "frames": ["b"]}},
        ),
        *("malformed", "messages[0].content[0].video_url", "either 'url' or 'frames'"),
    ),
    "too many frames": (
        messages,
        put(
            "messages",
            0,
            "content",
            0,
            value={"type": "video_url", "video_url": {"url": RED, "max_frames": 999}},
        ),
        *("video", "", "max_frames 999 is above the 180 frames allowed"),
    ),
    "a picture as video": (
        messages,
        put("messages", 0, "content", 0, value={"type": "video_url", "video_url": {"url": RED}}),
        *("video", "", "is a picture (PNG)"),
    ),
    "missing image": (
        *(messages, put("messages", 0, "content", 0, "image_url", "url", value="none.png")),
        *("image", "", "there is no file"),
    ),
    "broken image": (
        *(messages, put("messages", 0, "content", 0, "image_url", "url", value=RED[:90])),
        *("image", "", "data:image/png"),
    ),
    "no answer": (messages, without("messages", 3), "no answer", "", "the last message must be"),
    "untrained": (
        *(messages, lambda r: {"messages": [r["messages"][0], {**r["messages"][3], "trained": False}]}),
        *("nothing trained", "", "no token"),
    ),
    "too long": (messages, put("messages", 3, "content", value="w " * 999), "too long", "", "max_length 300"),
    "surrogate": (
        messages,
        put("messages", 3, "content", value="\ud800"),
        "malformed",
        "messages[3].content",
        "surrogate",
    ),
    "src without tgt": (erniekit, put("tgt", value=["a1"]), "malformed", "", "2, 1 and 2 entries"),
    "empty src": (erniekit, put("src", 1, value="  "), "malformed", "src[1]", "is empty"),
    "bad tag": (
        text_info,
        put("text_info", 1, "tag", value="nomask"),
        "malformed",
        "text_info[1].tag",
        "'nomask'",
    ),
    "bad index": (
        *(text_info, put("image_info", 0, "matched_text_index", value=2)),
        *("malformed", "image_info[0].matched_text_index", "is 2"),
    ),
    "VL video": (
        text_info,
        put("video_info", value=[{"image_url": "a.mp4"}]),
        "malformed",
        "video_info",
        "say with 'order'",
    ),
    "no output": (alpaca, without("output"), "malformed", "", "exactly one of output"),
    "odd history": (
        alpaca,
        put("history", 0, value=["q0"]),
        "malformed",
        "history[0]",
        "a question and an answer",
    ),
    "bad speaker": (
        *(sharegpt, put("conversations", 1, "from", value="robot")),
        *("malformed", "conversations[1].from", "'robot'"),
    ),
    "marks": (sharegpt, put("conversations", 0, "value", value="q"), "malformed", "images", "lists 1 images"),
    "equal answers": (
        preference,
        put("rejected", "content", value="chosen"),
        "malformed",
        "",
        "same as chosen",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    ids = [tokenizer.id_of(f"<|IMAGE_{name}|>") for name in ("PLACEHOLDER", "START", "END")]
    template = Template.for_checkpoint(tokenizer, "", "vl_thinking")
    return Encoder(template, 300, vision=VisionTokens(ids[0], frozenset(ids)), limits=ImageLimits())


def write(folder: Path, name: str) -> tuple[Path, list[int]]:
    """Ten bad records of a kind, after a good one, between other good ones; the bad lines' numbers."""
    good, change, *_ = KINDS[name]
    texts, bad = [json.dumps(good())], []
    for number in range(10):
        texts += [json.dumps(good())] * (number % 3)
        bad.append(len(texts) + 1)
        texts.append(change if isinstance(change, str) else json.dumps(change(good())))
    path = folder / "data.jsonl"
    path.write_text("\n".join(texts) + "\n")
    return path, bad


@pytest.mark.parametrize("name", KINDS)
def test_every_bad_record_is_named_and_none_is_trained(tmp_path: Path, encoder: Encoder, name: str) -> None:
    path, bad = write(tmp_path, name)
    _, _, reason, field, word = KINDS[name]
    report = check([path], encoder)
    assert [finding.detail.split(": ")[0] for finding in report.findings] == [f"{path}:{n}" for n in bad]
    assert {(finding.reason, finding.field) for finding in report.findings} == {(reason, field)}
    assert all(word in finding.detail for finding in report.findings)
    assert report.summary[0][2] == 10
    if name != "equal answers":
        dataset = Dataset([open_source(path)], encoder, on_error="skip")
        results = {row + 1: dataset.samples(row) for row in range(len(dataset))}
        assert [line for line, got in results.items() if any(isinstance(one, Skipped) for one in got)] == bad
        assert all(isinstance(one, Sample) for line in results.keys() - bad for one in results[line])


def test_there_are_38_kinds() -> None:
    assert len(KINDS) == 38


def test_without_a_model_schema_and_pictures_are_checked(tmp_path: Path) -> None:
    needs_model = {"too long"}
    for name in KINDS.keys() - needs_model:
        path, bad = write(tmp_path, name)
        findings = check([path]).findings
        assert [finding.detail.split(": ")[0] for finding in findings] == [f"{path}:{n}" for n in bad], name


def test_a_report_in_words(tmp_path: Path, encoder: Encoder) -> None:
    path, bad = write(tmp_path, "bad role")
    text = lines(check([path, tmp_path / "none.jsonl"], encoder))
    assert text[0].startswith(f"{path}:{bad[0]}: messages[3].role is 'bot'; allowed: ")
    assert text[10] == f"{tmp_path / 'none.jsonl'}: no such file or folder  [unreadable file]"
    assert text[12].startswith("20 records, 11 wrong; 10 samples, ")
    assert text[13:] == ["  10  malformed  messages[].role", "   1  unreadable file"]


def test_good_files_say_so(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record()) + "\n" for record in (messages, messages)))
    assert lines(check([path], encoder, workers=2))[0].startswith("2 records, nothing wrong; 2 samples, ")
    assert lines(check([path])) == ["2 records, nothing wrong"]


def test_pairs_are_checked_as_both_of_their_dialogues(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(preference()) + "\n")
    report = check([path], encoder)
    assert (report.records, report.samples, report.findings) == (1, 2, [])
    broken = preference()
    broken["rejected"]["content"] = "w " * 999
    path.write_text(json.dumps(broken) + "\n")
    (finding,) = check([path], encoder).findings
    assert finding.detail.startswith(f"{path}:1: rejected: 1091 tokens are more than")
    assert finding.reason == "too long"


@pytest.mark.parametrize("overlong", ["error", "skip"])
def test_a_training_configuration_is_checked_as_the_training_reads_it(tmp_path: Path, overlong: str) -> None:
    good = {"messages": [{"role": "user", "content": "q"}], "chosen": "red", "rejected": "blue"}
    long = {**good, "chosen": "red " * 60}  # either side fits a row of 128 tokens, the pair does not
    long["rejected"] = "blue " * 60
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (good, long, {"messages": []})))
    config = build(
        {
            "model": {"path": str(Path(__file__).parents[2] / "data" / "tiny")},
            "data": {"train": [str(path)], "eval": [str(tmp_path / "gone.jsonl")], "max_length": 128},
            "train": {"output": str(tmp_path / "run"), "objective": "dpo", "steps": 1},
        },
        [f"data.overlong={overlong}"],
        "test",
        {},
    )
    report = check_training(config, processor_for(config.model.path))
    assert (report.records, report.samples, report.trained) == (3, 1, 4)
    assert [finding.reason for finding in report.findings] == ["too long", "malformed", "unreadable file"]
    assert report.findings[0].detail.startswith(f"{path}:2: ")


def test_an_empty_answer_is_wrong_unless_it_is_not_trained(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    path = tmp_path / "d.jsonl"
    untrained = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turns, untrained)))
    (finding,) = check([path]).findings
    assert finding.reason == "empty answer"
    assert finding.detail.startswith(f"{path}:1: answer 1 of 2 is empty")
