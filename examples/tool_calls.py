"""How many function calls are right, before and after tuning, asked through the served API.

    python examples/tool_calls.py              make data, train configs/tiny/sft_tools.yaml, then measure
    python examples/tool_calls.py --run RUN    measure a run that is there

Every answer of records that the training never saw is asked for with the openai client: the messages before
it and the record's tools go in, and the calls that come back must equal the record's, name and arguments, as
JSON. Where the record has no call there must be none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from demo import BASE, ROOT, command, server

RUN = ROOT / "runs/tool-calls"
REQUESTS = ROOT / "runs/tool-requests"  # what configs/tiny/sft_tools.yaml trains on
MAX_TOKENS = 200  # two calls
AT_ONCE = 16  # requests
AIM = 0.9  # share of exact calls
Call = tuple[str, Any]  # name, arguments


@dataclass(frozen=True)
class Case:
    """A request with its history, the calls it asks for, and the text when it asks for none."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    calls: list[Call]
    text: str | None


@dataclass(frozen=True)
class Score:
    """Numbers of right answers and of requests, of those that ask for calls and of those that do not."""

    called: int
    to_call: int
    silent: int
    to_keep_silent: int

    def row(self) -> tuple[str, str, str]:
        """As shares: exact calls, no call where none is due, both."""
        both = self.called + self.silent, self.to_call + self.to_keep_silent
        pairs = ((self.called, self.to_call), (self.silent, self.to_keep_silent), both)
        first, second, third = (f"{right / count:.1%} ({right} of {count})" for right, count in pairs)
        return first, second, third


def cases(path: Path) -> Iterator[Case]:
    """Every answer that follows a user message, with the true messages before it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for index, message in enumerate(record["messages"]):
            if message["role"] == "assistant" and record["messages"][index - 1]["role"] == "user":
                functions = [call["function"] for call in message.get("tool_calls") or []]
                calls = [(function["name"], function["arguments"]) for function in functions]
                history = [_as_sent(earlier) for earlier in record["messages"][:index]]
                yield Case(history, record["tools"], calls, message["content"])


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a record in the API's form: arguments as text."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
    return {**message, "tool_calls": [{"type": "function", "function": text} for text in texts]}


def ask(client: OpenAI, case: Case) -> tuple[list[Call], str | None]:
    """The calls and the text that the served model answers with."""
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        model="tiny", messages=case.messages, tools=case.tools, temperature=0, max_tokens=MAX_TOKENS
    )
    message = answer.choices[0].message
    functions = [call.function for call in message.tool_calls or []]
    return [(function.name, json.loads(function.arguments)) for function in functions], message.content


def measure(model: Path, held_out: list[Case], show: int) -> Score:
    """Serve a model and ask for every case; the first `show` wrong answers are printed."""
    with server(model) as url, ThreadPoolExecutor(AT_ONCE) as pool:
        client = OpenAI(base_url=url, api_key="none")
        answers = list(pool.map(partial(ask, client), held_out))
    right = {True: 0, False: 0}
    for case, (calls, text) in zip(held_out, answers, strict=True):
        right[bool(case.calls)] += calls == case.calls
        if calls != case.calls and show > 0:
            show -= 1
            print(f"{case.messages[-1]['content']}\n  wanted {case.calls}\n  got    {calls} {text!r}")
    wanted = sum(bool(case.calls) for case in held_out)
    return Score(right[True], wanted, right[False], len(held_out) - wanted)


def main() -> None:
    """Train, measure the base and the run, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="a finished run; without it one is trained")
    parser.add_argument("--data", type=Path, default=REQUESTS / "test.jsonl")
    parser.add_argument("--show", type=int, default=5, help="wrong answers to print")
    args = parser.parse_args()
    if args.run is None:
        subprocess.run([sys.executable, ROOT / "examples/tool_requests.py", REQUESTS], check=True)
    held_out = list(cases(args.data))
    table = Table(
        "model", "exact calls", "no call where none is due", "all", title="ernietune: function calls"
    )
    table.add_row("before", *measure(BASE, held_out, show=0).row())
    run, seconds = args.run, 0.0
    if run is None:
        run = RUN
        shutil.rmtree(run, ignore_errors=True)
        seconds = command("train", "configs/tiny/sft_tools.yaml", f"train.output={run}")
    started = time.perf_counter()
    after = measure(run, held_out, args.show)
    table.add_row("after", *after.row())
    Console().print(table)
    print(f"{seconds:.0f} s of training, {time.perf_counter() - started:.0f} s for {len(held_out)} requests")
    if after.called < AIM * after.to_call:
        sys.exit(f"fewer than {AIM:.0%} of the calls are exact")


if __name__ == "__main__":
    main()
