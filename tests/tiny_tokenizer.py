"""A small SentencePiece tokenizer with ERNIE's special tokens, for tests that need a published folder."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import sentencepiece

SPECIAL_TOKENS = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
    "<|im_start|>",
    "<|im_end|>",
)
VOCAB_SIZE = 480
_CORPUS = """User: Hello, how are you today? Assistant: I am fine, thank you; what is the weather like?
You are a helpful assistant. Please answer the question about the picture in one short sentence.
The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the sun.
{"name": "get_weather", "arguments": {"city": "Paris"}} think_mode=True system_setting global_setting
a question of words and numbers : the answers to all questions are in the words that follow them
def main(value): return value + value  # comments are words too, and whitespace    matters
"""


@functools.cache
def _model() -> bytes:
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.splitlines() * 20),
        model_writer=target,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=[*SPECIAL_TOKENS, *"0123456789"],
        minloglevel=2,
    )
    return target.getvalue()


def write_tokenizer(folder: str | Path) -> Path:
    """Write tokenizer.model and tokenizer_config.json of the tiny tokenizer (480 ids) into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_model())
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[2:7]),
        "tokenizer_class": "Ernie4_5_Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder
