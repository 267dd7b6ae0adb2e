"""A tensor group at work on one batch: gradients against a whole model, and what the graph keeps.

python tensor_work.py RESULT.json        as every process of a launch; the first one writes
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import paddle
import tiny
from paddle.base import core

from ernietune import launch
from ernietune.lora import inject
from ernietune.memory_modes import recompute_of
from ernietune.models.moe import Router
from ernietune.parallel import apply as parallelism
from ernietune.parallel import saved
from ernietune.parallel.degrees import Degrees
from ernietune.parallel.team import Team
from ernietune.targets import LoraSpec

ALL = ("attention", "mlp", "shared_experts", "experts", "vision", "resampler")
COLUMNS = (r"model\.layers\.\d+\.self_attn\.[qkv]_proj",)
# name: (recompute, offload, adapters' targets, dropout). Only what stands before whole inputs draws alike.
CASES = {
    "none": ("none", False, ALL, 0.0),
    "none, offload": ("none", True, ALL, 0.0),
    "layers": ("layers", False, ALL, 0.0),
    "layers, offload": ("layers", True, ALL, 0.0),
    "every-2": ("every-2", False, ALL, 0.0),
    "attention+moe": ("attention+moe", False, ALL, 0.0),
    "norm": ("norm", False, ALL, 0.0),
    "norm+activation, offload": ("norm+activation", True, ALL, 0.0),
    "attention+norm": ("attention+norm", False, ALL, 0.0),
    "untied": ("none", False, ALL, 0.0),
    "dropout": ("none", False, COLUMNS, 0.3),
    "dropout, layers": ("layers", False, COLUMNS, 0.3),
}


def batch():
    """Three packed documents, two with a picture; their number of tokens is odd."""
    grids = [(1, 4, 4), (1, 4, 6)]
    documents = [
        tiny.document([3, "image", 7], grids[:1], seed=1),
        tiny.document([11], seed=2),
        tiny.document([2, "image", 4], grids[1:], seed=3),
    ]
    made = tiny.pack(documents, grids, [tiny.picture(grid, seed) for seed, grid in enumerate(grids)])
    assert made.ids.shape[0] % 2
    return made


def adapt(model, targets, dropout):
    """Adapters everywhere, none of them zero; norms and routers train as well."""
    inject(model, LoraSpec(rank=2, targets=targets, dropout=dropout))
    random = np.random.default_rng(3)
    for path, parameter in model.named_parameters():
        if path.endswith(("lora_A", "lora_B")):
            parameter.set_value(0.1 * random.standard_normal(parameter.shape).astype(np.float32))
        if "norm" in path or ".router." in path:
            parameter.stop_gradient = False
    model.train()


def divided(team, whole, targets, dropout):
    """What this process holds of `whole`."""
    model = parallelism.build(whole.config, "float32", team)
    adapt(model, targets, dropout)
    values = dict(whole.named_parameters())
    for path, parameter in model.named_parameters():
        parameter.set_value(np.ascontiguousarray(team.holding.cut(path, values[path].numpy())))
    biases = [layer.correction_bias for layer in whole.sublayers() if isinstance(layer, Router)]
    for layer in model.sublayers():
        if isinstance(layer, Router):
            layer.correction_bias.set_value(biases.pop(0))
    return model


def label_losses(model, inputs):
    """The loss of a random label of every token, worked out 7 tokens at a time."""
    paddle.seed(11)
    labels = np.random.default_rng(5).integers(0, model.config.vocab_size, inputs.ids.shape[0])
    return model.cross_entropy(model(inputs), model.head_weight, paddle.to_tensor(labels), 7)


def backward(model, inputs):
    """Every token's loss has a weight of its own; the losses, and again without a gradient."""
    losses = label_losses(model, inputs)
    weights = np.random.default_rng(6).standard_normal(losses.shape).astype(np.float32)
    (losses * paddle.to_tensor(weights)).mean().backward()
    with paddle.no_grad():
        again = label_losses(model, inputs)
    return np.stack([losses.numpy(), again.numpy()])


def difference(team, case):
    """The largest difference of a gradient from the whole model's, relative to that gradient; and whose."""
    mode, offload, targets, dropout = CASES[case]
    whole, inputs = tiny.model("tiny-vl", tie_word_embeddings=case != "untied"), batch()
    adapt(whole, targets, dropout)
    losses = backward(whole, inputs)
    expected = {path: p.grad for path, p in whole.named_parameters() if not p.stop_gradient}
    model = divided(team, whole, targets, dropout)
    trained = parallelism.apply(
        model, team, stage=0, base_sharded=False, recomputed=recompute_of(mode), offload=offload
    )
    losses = np.abs(backward(model, inputs) - losses).max()
    reached = trained.collect()
    assert reached == {path for path, grad in expected.items() if grad is not None}
    worst = {}
    for path in sorted(reached):
        wanted = expected[path].numpy()
        found = trained.whole(path, trained.updated[path].grad)
        worst[path] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    path = max(worst, key=worst.get)
    return {"difference": worst[path], "path": path, "parameters": len(worst), "losses": float(losses)}


def kept(team, layers, mode):
    """Bytes alive between the forward and the backward pass over 1,000 tokens."""
    whole = tiny.model("tiny-dense", num_hidden_layers=layers)
    adapt(whole, ("attention", "mlp"), 0.0)
    model = whole if team is None else divided(team, whole, ("attention", "mlp"), 0.0)
    parallelism.apply(model, team or Team.alone(), stage=0, base_sharded=False, recomputed=recompute_of(mode))
    inputs = tiny.pack([tiny.document([1000])])
    gc.collect()
    before = core.host_memory_stat_current_value("Allocated", 0)
    hidden = model(inputs)
    found = core.host_memory_stat_current_value("Allocated", 0) - before
    hidden.mean().backward()
    return found


def kept_by_a_layer(team, mode):
    """What two more layers add, by one."""
    return (kept(team, 4, mode) - kept(team, 2, mode)) / 2


def main():
    team = Team.of(Degrees(tensor=launch.Place.here().world))
    saved.LEAST_BYTES = 0
    found = {case: difference(team, case) for case in CASES}
    modes = ("none", "layers", "attention", "norm")
    found["kept"] = {mode: [kept_by_a_layer(t, mode) for t in (None, team)] for mode in modes}
    found["told"] = team.told(lambda: {"rank": team.world.index, "asked": 1.0})
    assert found["told"] == {"rank": 0, "asked": 1.0}
    if team.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
