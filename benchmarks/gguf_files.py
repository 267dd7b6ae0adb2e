"""Checkpoints in llama.cpp's own format, for `benchmarks/decode.py`: enough for speed, no vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def gguf_file(folder: Path, form: str) -> Path:
    """The checkpoint in GGUF, written when it is asked for first."""
    import llama_cpp as c

    path = folder / f"{form}.gguf"
    if not (folder / "f16.gguf").is_file():
        write_gguf(folder, folder / "f16.gguf")
    if not path.is_file():
        params = c.llama_model_quantize_default_params()
        params.ftype = {"q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0}[form]
        code = c.llama_model_quantize(str(folder / "f16.gguf").encode(), str(path).encode(), params)
        assert code == 0, code
    return path


_DENSE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write_gguf(folder: Path, path: Path) -> None:
    """Matrices as f16, vectors and routers as f32, no vocabulary: enough for speed."""
    import gguf

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    experts = raw.get("moe_num_experts", 0)
    writer = gguf.GGUFWriter(path, "ernie4_5-moe" if experts else "ernie4_5")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    writer.add_context_length(4096)
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(raw["moe_k"])
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
        writer.add_expert_shared_count(raw["moe_num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(
            raw["moe_intermediate_size"] * raw["moe_num_shared_experts"]
        )
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(raw["moe_layer_start_index"])
    stored = tensors(folder)
    writer.add_tensor("token_embd.weight", stored["model.embed_tokens.weight"]().astype(np.float16))
    writer.add_tensor("output_norm.weight", stored["model.norm.weight"]())
    for layer in range(raw["num_hidden_layers"]):
        add_layer(writer, stored, layer, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_layer(writer: Any, stored: dict[str, Any], layer: int, experts: int) -> None:
    """One layer under llama.cpp's names."""
    source, target = f"model.layers.{layer}.", f"blk.{layer}."
    for name, other in _DENSE.items():
        if f"{source}{name}.weight" in stored:
            numbers = stored[f"{source}{name}.weight"]()
            kept = numbers.ndim == 1 or other == "ffn_gate_inp"
            writer.add_tensor(f"{target}{other}.weight", numbers if kept else numbers.astype(np.float16))
    if f"{source}mlp.gate.weight" not in stored:
        return
    bias = stored[f"{source}mlp.moe_statics.e_score_correction_bias"]().reshape(-1)
    writer.add_tensor(f"{target}exp_probs_b.bias", bias)
    for part in ("gate", "up", "down"):
        stack = [
            stored[f"{source}mlp.experts.{e}.{part}_proj.weight"]().astype(np.float16) for e in range(experts)
        ]
        writer.add_tensor(f"{target}ffn_{part}_exps.weight", np.stack(stack))


def tensors(folder: Path) -> dict[str, Any]:
    """Name -> a function that reads the fp32 numbers; safetensors of BF16 and F32, without a library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        for name, info in header.items():
            found[name] = lambda data=data, start=8 + size, info=info: numbers_of(data, start, info)
    return found


def numbers_of(data: np.ndarray, start: int, info: dict[str, Any]) -> np.ndarray:
    """One stored tensor as fp32."""
    begin, end = info["data_offsets"]
    raw = np.asarray(data[start + begin : start + end])
    if info["dtype"] == "F32":
        return raw.view(np.float32).reshape(info["shape"]).copy()
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(info["shape"])
