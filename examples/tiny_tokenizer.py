"""Train the tiny demo model's tokenizer and write it as a published ERNIE-4.5-VL folder has it.

    python examples/tiny_tokenizer.py data/tiny

The form is the real one (SentencePiece BPE with byte fallback, no dummy space, one token a digit, the special
tokens by their names); the vocabulary is small, so the ids differ. No chat template is written: the built-in
VL template is used.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).parent))
from shape_words import COLORS, PLACES, SHAPES, TEXT_PAIRS
from shapes import badges, generate, pretrain_record

VOCABULARY = 1200
TEXT_TIMES = 20  # general sentences count this often against the questions of the pictures
ROLES = ("User: ", "Assistant: ", "Picture 1:")  # so often that each becomes one word
# Chinese has no spaces, so whole questions would become one piece; no piece may cross a border of these.
CHINESE_WORDS = re.compile(
    "|".join([*COLORS.values(), *SHAPES.values(), *PLACES["zh"]])
    + "|什么|物体|形状|颜色|徽章|代码|图中|没有|相同|不同|一样|哪里|哪种|几个|这个|两张|首都|反义词|看到"
    + "|[的是有在哪这张图吗了里个条数第几]"
)
BORDER = "\x01"
# fmt: off
SPECIAL = (
    "<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>",
    "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_list>", "</tool_list>", "<tool_output>", "</tool_output>", "<tool_response>", "</tool_response>",
    "<response>", "</response>", "<|im_start|>", "<|im_end|>", "<mask:1>", "<mask:4>", "<mask:5>",
)
# fmt: on
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
    "sys_start_token": "<mask:4>",
    "sys_end_token": "<mask:5>",
    "additional_special_tokens": list(SPECIAL[2:7]),
    "tokenizer_class": "Ernie4_5_VLTokenizer",
}
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Ernie4_5_VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 50176,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_conv_size": 2,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def texts() -> list[str]:
    """What the vocabulary is learned from: questions, answers and general sentences, as they are encoded."""
    lines = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    for pairs in TEXT_PAIRS.values():
        lines += [text for pair in pairs for text in pair]
    lines = lines * TEXT_TIMES + [*ROLES] * 500 + [*string.ascii_letters, *string.punctuation]
    for record in (*generate(pretrain_record, 2000, seed=0), *badges(10, seed=0)):
        lines += [text for message in record["messages"] for text in _texts(message["content"])]
    return [CHINESE_WORDS.sub(BORDER + r"\g<0>" + BORDER, line) for line in lines]


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def train(vocabulary: int) -> bytes:
    """A serialized SentencePiece model with exactly `vocabulary` pieces."""
    lines = texts()
    np.random.default_rng(0).shuffle(lines)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pretokenization_delimiter=BORDER,
        user_defined_symbols=[*SPECIAL, *string.digits],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    """Command line: train and write the three files."""
    parser = argparse.ArgumentParser(description="Train the tiny tokenizer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "tokenizer.model").write_bytes(train(args.vocabulary))
    for name, value in (("tokenizer_config", TOKENIZER_CONFIG), ("preprocessor_config", PREPROCESSOR_CONFIG)):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (args.folder / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{args.folder}: {args.vocabulary} tokens")


if __name__ == "__main__":
    main()
