"""Random checkpoints of any published or tiny shape, written without building the model.

They load, train, export and serve like published ones, so code and hardware can be tried before 50 GB are
downloaded. A parameter's numbers depend on its name and the seed only: both layouts of a seed are one model.
"""

from __future__ import annotations

import copy
import io
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.checkpoint.dtypes import STORAGE, Array, from_float32
from ernietune.checkpoint.folder import copy_side_files, staged
from ernietune.checkpoint.names import TIED, DiskTensor, Target, layout_named, mtp_depth, table
from ernietune.checkpoint.safetensors import TensorInfo, Writer, write_json
from ernietune.errors import CheckpointError, listed
from ernietune.models.config import SHAPES, ModelConfig
from ernietune.text.tokenizer import Tokenizer

_DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
_MEDIA_TOKENS = {
    "im_patch_id": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token_id": "<|IMAGE_START|>",
    "image_end_token_id": "<|IMAGE_END|>",
    "video_start_token_id": "<|VIDEO_START|>",
    "video_end_token_id": "<|VIDEO_END|>",
}
_SPECIAL_TOKENS = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    *_MEDIA_TOKENS.values(),
    "<|AUDIO_PLACEHOLDER|>",
    *(f"<mask:{i}>" for i in (1, 4, 5, 6, 7)),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"),
    *("<|im_start|>", "<|im_end|>"),
)
_PIECES = 640
_SAMPLE_TEXT = """User: Hello, how are you today? Assistant: I am fine, thank you. What would you like?
You are a helpful assistant. Please answer the question about the picture in one short sentence.
The train to the north leaves at 10:45 from platform 3; buy the ticket before you get on, please.
What is shown in this picture? The picture shows a small house near the river, with two trees in the garden.
Write a function that adds two numbers. def add(first, second): return first + second  # simple
{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius"}}}
think_mode=True global_setting system_setting tool_list tool_response
Water boils at 100 degrees at sea level, but in the mountains the air is thinner, so it boils sooner there.
Two friends were walking through the old part of the city when they heard music behind a closed door.
First find the name of the author, then count the books, and finally sort them by the year of printing.
The invoice of 24 March 2025 lists 12 items, 3 of which were sent back; the total is 1,846.50 euros.
Picture 1: a red circle on a white field. Picture 2: a green square on a black field.
"""
_IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_center_crop": False,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
    "min_pixels": 3136,
    "max_pixels": 4816896,
    "patch_size": 14,
    "merge_size": 2,
}


def initialize(
    shape: str,
    output: str | Path,
    layers: int | None = None,
    layout: str = "pt",
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write a random checkpoint of a named shape, with tokenizer and processor files, as a new folder.

    `layers` cuts the text model to that many layers; `tokenizer` is a folder whose tokenizer and processor
    files are taken, and whose vocabulary size the model gets, instead of a small tokenizer made on the spot.
    CheckpointError for an unknown shape, layout or dtype, a folder that is not empty, or a full disk.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; choose one of {listed(sorted(_DTYPES))}")
    output, disk_layout = Path(output), layout_named(layout)
    raw = shape_config(shape, layers) | {"torch_dtype": dtype}
    with staged(output) as part:
        raw |= _write_words_and_pixels(part, raw, tokenizer)
        write_json(part / "config.json", raw)
        write_json(part / "generation_config.json", _generation_config(raw))
        config = ModelConfig.from_dict(raw, shape)
        entries = [e for e in table(config, disk_layout).values() if _is_stored(config, e)]
        stored_as = _DTYPES[dtype]
        infos = [TensorInfo(e.name, "F32" if e.keep_fp32 else stored_as, e.shape) for e in entries]
        with Writer(part, infos, max_shard_bytes) as writer:
            for entry, info in zip(entries, infos, strict=True):
                writer.add(entry.name, _random_tensor(entry, info.dtype, config, seed))
    return output


def _write_words_and_pixels(
    folder: Path, raw: dict[str, Any], tokenizer: str | Path | None
) -> dict[str, Any]:
    """Write the tokenizer and processor files; return the config.json fields that follow from them."""
    fields: dict[str, Any] = {}
    if tokenizer is None:
        ids = write_tokenizer(folder)
        if "vision_config" in raw:
            write_json(folder / "preprocessor_config.json", _IMAGE_PROCESSOR)
    else:
        copy_side_files(Path(tokenizer), folder)
        taken = Tokenizer.load(folder)
        ids = {token: taken.id_of(token) for token in _MEDIA_TOKENS.values()}
        fields["vocab_size"] = taken.vocab_size
    if "vision_config" in raw:
        fields |= {key: ids[token] for key, token in _MEDIA_TOKENS.items()}
    return fields


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Return the config.json content of a named shape, cut to `layers` layers when given."""
    if shape not in SHAPES:
        raise CheckpointError(f"unknown shape {shape!r}; choose one of {listed(sorted(SHAPES), 20)}")
    raw = copy.deepcopy(SHAPES[shape])
    if layers is None:
        return raw
    if layers < 1:
        raise CheckpointError(f"a model needs at least 1 layer, not {layers}")
    raw["num_hidden_layers"] = layers
    if "moe_num_experts" in raw:
        starts = raw["moe_layer_start_index"]
        first = min(starts) if isinstance(starts, list) else starts
        if layers <= first:
            raise CheckpointError(
                f"{shape} has its first expert layer at {first}; keep at least {first + 1} layers"
            )
        if raw.get("moe_layer_end_index") is not None:
            raw["moe_layer_end_index"] = [layers - 1] * 2 if "vision_config" in raw else layers - 1
    return raw


def write_tokenizer(folder: str | Path) -> dict[str, int]:
    """Train a small SentencePiece tokenizer with ERNIE's special tokens into `folder`; return their ids.

    It is a working tokenizer, but not the published one: ids differ, and it knows few words.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SAMPLE_TEXT.splitlines() * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=_PIECES,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=[*_SPECIAL_TOKENS, *"0123456789"],
        minloglevel=2,
    )
    folder = Path(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "Ernie4_5_Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "mask_token": "<mask:1>",
        "additional_special_tokens": list(_MEDIA_TOKENS.values()),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {token: processor.piece_to_id(token) for token in _SPECIAL_TOKENS}


def _generation_config(raw: dict[str, Any]) -> dict[str, Any]:
    ids = {key: raw[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {**ids, "do_sample": True, "temperature": 0.8, "top_p": 0.8}


def _is_stored(config: ModelConfig, entry: DiskTensor) -> bool:
    """Published VL folders store a tied head as well; MTP blocks exist where the config counts them."""
    if entry.reason == TIED:
        return config.is_vl
    depth = mtp_depth(entry.name)
    return depth is None or depth < config.num_nextn_predict_layers


def _random_tensor(entry: DiskTensor, dtype: str, config: ModelConfig, seed: int) -> Array:
    targets = entry.targets or (Target(_pass_through_param(entry)),)
    result = np.empty(entry.shape, STORAGE[dtype])
    for target in targets:
        region = target.region(result)
        np.copyto(region, from_float32(_numbers(target, region.shape, config, seed), dtype))
    return result


def _pass_through_param(entry: DiskTensor) -> str:
    """A stored tied head repeats the embedding; an MTP tensor has only its own name."""
    return "model.embed_tokens.weight" if entry.reason == TIED else entry.name


def _numbers(target: Target, shape: tuple[int, ...], config: ModelConfig, seed: int) -> NDArray[np.float32]:
    """Normal numbers of ERNIE's initial width sqrt(1/3 / hidden); norm weights are one, as in training."""
    if re.search(r"norm\d?(\.\d+)?\.weight$|\.ln\.weight$|_linear\.3\.weight$", target.param):
        return np.ones(shape, np.float32)
    name = f"{target.param}[{target.index}]"
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    width = math.sqrt(0.3333 / config.hidden_size)
    if target.param.endswith("correction_bias"):
        width = (
            0.1 / config.pools[0].count
        )  # a tenth of a uniform router's probability: visible, not dominant
    numbers = random.standard_normal(shape, dtype=np.float32)
    numbers *= np.float32(width)
    return numbers
