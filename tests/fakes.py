"""Stand-ins with a known answer: bytes as tokens, and a model that speaks a script."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import paddle

from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.text.template import Rendered

EOS = 2
FIRST_BYTE = 10
VOCABULARY = FIRST_BYTE + 256
START, END, PLACEHOLDER = 6, 7, 5


def tokens(text: str | bytes) -> list[int]:
    """One token per byte, so that every other character is spread over several tokens."""
    return [FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


class ByteTokenizer:
    chat_template = None

    def bytes_of(self, token):
        return bytes([token - FIRST_BYTE]) if FIRST_BYTE <= token < VOCABULARY else b""

    def encode_plain(self, text):
        return tokens(text)

    def encode(self, text):
        return tokens(text)

    def spelling(self, token):
        return bytes([token - FIRST_BYTE]) if FIRST_BYTE <= token < VOCABULARY else None

    def decode(self, ids, skip_special=True):
        return bytes(id - FIRST_BYTE for id in ids if FIRST_BYTE <= id < VOCABULARY).decode(errors="replace")


class PlainTemplate:
    """All texts in a row, pictures between their start and end tokens."""

    kind = "text"
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
    """Answers with the tokens of a script, whatever the prompt.

    `seen` keeps the inputs of every forward, with the pictures that were looked at for it. Prompts have
    to fit into one step, and the prefix cache has to be off: a sequence is known by its first slot.
    """

    dtype = "float32"

    def __init__(self, script, is_vl=False):
        self.script, self.seen = list(script), []
        self.config = SimpleNamespace(
            is_vl=is_vl,
            max_position_embeddings=4096,
            vocab_size=VOCABULARY,
            num_hidden_layers=1,
            num_key_value_heads=1,
            head_dim=1,
            image_token_id=PLACEHOLDER,
            vision_token_ids=(PLACEHOLDER, START, END),
        )
        self.steps = threading.Semaphore(0)
        self.stepwise = False
        self._prompts, self._pictures = {}, []

    def picture_features(self, patches, grids):
        self._pictures.append((patches, *grids))
        return paddle.zeros([patches.shape[0] // 4, 1])

    def __call__(self, inputs, cache):
        if self.stepwise:
            self.steps.acquire()
        self._look(inputs)
        steps = []
        for span in cache.spans:
            if span.first == 0:
                self._prompts[span.slots[0]] = span.length
            steps += [float(span.length - self._prompts[span.slots[0]])] * (span.stop - span.start)
        return self.asked_for(inputs, paddle.to_tensor(steps).reshape([-1, 1]))

    def asked_for(self, inputs, hidden):
        rows = inputs.wanted_rows
        return hidden if rows is None else paddle.gather(hidden, rows)

    def _look(self, inputs):
        patches = paddle.concat([patches for patches, _ in self._pictures]) if self._pictures else None
        grids = tuple(grid for _, grid in self._pictures)
        self._pictures = []
        self.seen.append(
            SimpleNamespace(
                ids=inputs.ids,
                positions=inputs.positions,
                is_vision=inputs.is_vision,
                patches=patches,
                grids=grids,
            )
        )

    def logits(self, hidden):
        said = [self.script[int(step) % len(self.script)] for step in hidden[:, 0].tolist()]
        return 10 * paddle.nn.functional.one_hot(paddle.to_tensor(said), VOCABULARY)


def engine(script="Hello!", is_vl=False, max_length=1000, end=True, max_sequences=4):
    """An engine that answers `script` and then ends its turn (without `end` it starts again)."""
    answer = tokens(script) if isinstance(script, str | bytes) else list(script)
    model = ScriptedModel(answer + ([EOS] if end else []), is_vl)
    options = EngineOptions(max_sequences=max_sequences, max_batched_tokens=4096, prefix_cache=False)
    return Engine(model, ByteTokenizer(), PlainTemplate(), max_length=max_length, options=options)
