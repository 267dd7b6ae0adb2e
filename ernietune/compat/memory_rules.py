"""Their ways of saving memory as train.recompute and train.offload."""

from __future__ import annotations

from ernietune.compat.translation import PADDLEFORMERS, Translation

# Scores of attention are never kept here, so that there is nothing to recompute of the core alone.
_GRANULARITIES = {
    "full": "layers",
    "full_attn": "attention",
    "core_attn": "none",
    "selective": "none",
}
_MODULES = {
    "core_attn": "",
    "full_attn": "attention",
    "moe": "moe",
    "moe_act": "activation",
    "layernorm": "norm",
}
_ON_HOST = {
    "offload_recompute_inputs": "activations",
    "offload_optim": "optimizer",
    "tensorwise_offload_optimizer": "optimizer",
}


def memory(t: Translation) -> None:
    """Recompute by granularity and modules, the MoE block by itself, and what waits on the host."""
    _recompute(t)
    asked = [key for key in _ON_HOST if t.take(key, bool, False)]
    if asked:
        t.put("train.offload", "+".join(dict.fromkeys(_ON_HOST[key] for key in asked)), *asked)


def _recompute(t: Translation) -> None:
    # `recompute` is ERNIEKit's switch; PaddleFormers switches with the granularity.
    parts = ["moe"] if t.take("use_recompute_moe", bool, False) else []
    deciding = ["use_recompute_moe"] if parts else []
    mode = "none"
    if t.has("recompute"):
        on = t.given["recompute"].value == "full" or t.take("recompute", bool, False)
        deciding.insert(0, "recompute")
        mode = _granularity(t, deciding) if on else "none"
    elif t.toolkit == PADDLEFORMERS and t.has("recompute_granularity"):
        mode = _granularity(t, deciding)
        parts += _modules(t, deciding)
    if not deciding:
        return
    named = [mode] if mode not in ("none", "layers") else []
    joined = "+".join(dict.fromkeys(named + parts)) or "none"
    t.put("train.recompute", "layers" if mode == "layers" else joined, *deciding)


def _granularity(t: Translation, deciding: list[str]) -> str:
    if not t.has("recompute_granularity"):
        return "layers"
    deciding.append("recompute_granularity")
    mode = t.choice("recompute_granularity", "full", _GRANULARITIES)
    if mode == "none":
        t.note(
            "recompute_granularity: scores of attention are never kept here, nothing of it is recomputed",
            "recompute_granularity",
        )
    return mode


def _modules(t: Translation, deciding: list[str]) -> list[str]:
    """PaddleFormers' list of parts, for its selective granularity."""
    if t.take("recompute_granularity", str, "full").lower() != "selective":
        return []
    found = t.items("recompute_modules")
    if not found:
        return []
    deciding.append("recompute_modules")
    unknown = [name for name in found if name not in _MODULES]
    if unknown:
        t.note(f"recompute_modules: {', '.join(unknown)} is kept here", "recompute_modules")
    return [_MODULES[name] for name in found if _MODULES.get(name)]
