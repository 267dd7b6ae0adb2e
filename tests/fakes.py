"""Stand-ins with a known answer: bytes as tokens, and a model that speaks a script."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import paddle

from ernietune.infer.engine import Engine
from ernietune.text.template import Rendered

EOS = 2
FIRST_BYTE = 10
VOCABULARY = FIRST_BYTE + 256
START, END, PLACEHOLDER = 6, 7, 5


def tokens(text: str | bytes) -> list[int]:
    """One token per byte, so that every other character is spread over several tokens."""
    return [FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


class ByteTokenizer:
    def decode(self, ids, skip_special=True):
        return bytes(id - FIRST_BYTE for id in ids if FIRST_BYTE <= id < VOCABULARY).decode(errors="replace")


class PlainTemplate:
    """All texts in a row, pictures between their start and end tokens."""

    stop_ids = (EOS,)

    def __init__(self):
        self.options = None

    def render(self, conversation, image_tokens, add_generation_prompt=False, **options):
        self.options = options
        counts = iter(image_tokens)
        ids, media = [], []
        for part in (part for message in conversation.messages for part in message.parts):
            if part.kind == "text":
                ids += tokens(part.text)
            else:
                count = next(counts)
                media.append((len(ids) + 1, count))
                ids += [START] + [PLACEHOLDER] * count + [END]
        return Rendered(ids=ids, labels=ids, media=media)


class ScriptedModel:
    """Answers with the tokens of a script, whatever the prompt; `seen` keeps the inputs of every forward."""

    def __init__(self, script, is_vl=False):
        self.script, self.seen = list(script), []
        self.config = SimpleNamespace(
            is_vl=is_vl,
            max_position_embeddings=4096,
            image_token_id=PLACEHOLDER,
            vision_token_ids=(PLACEHOLDER, START, END),
        )
        self.steps = threading.Semaphore(0)
        self.stepwise = False

    def __call__(self, inputs, cache):
        if self.stepwise:
            self.steps.acquire()
        self.seen.append(inputs)
        row = paddle.zeros([inputs.ids.shape[0], 1, 1])
        row.numpy()
        keys, _ = cache.update(0, row, row)
        if cache.tokens == inputs.ids.shape[0]:
            self.prompt = cache.tokens
        step = keys.shape[0] - self.prompt
        return paddle.full([inputs.ids.shape[0], 1], float(step))

    def logits(self, hidden):
        token = self.script[int(hidden[-1, 0].item()) % len(self.script)]
        return 10 * paddle.nn.functional.one_hot(paddle.to_tensor([token]), VOCABULARY)


def engine(script="Hello!", is_vl=False, max_length=1000, end=True):
    """An engine that answers `script` and then ends its turn (without `end` it starts again)."""
    answer = tokens(script) if isinstance(script, str | bytes) else list(script)
    model = ScriptedModel(answer + ([EOS] if end else []), is_vl)
    return Engine(model, ByteTokenizer(), PlainTemplate(), max_length=max_length)
