"""Degrees of parallelism: which there are here, and what becomes of the others."""

from __future__ import annotations

from ernietune.compat.translation import Translation

# What there is nothing of here: the numbers of a micro-batch are the same without, its memory is not.
_ABSENT = ("pipeline_parallel_degree", "context_parallel_degree", "sep_parallel_degree")
_STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}


def processes(t: Translation) -> None:
    """Several cards: tensor and expert degrees as they are, sharding ranks as data, others become 1."""
    high = [key for key in _ABSENT if t.take(key, int, 1) > 1]
    if high:
        degrees = ", ".join(f"{t.given[key].key} {t.take(key, int, 1)} -> 1" for key in high)
        t.note(
            f"{degrees}: not available; the numbers of a micro-batch are the same, but every card holds all "
            "layers and whole sequences (docs/parallel.md says what divides them instead)",
            *high,
        )
    adapters = bool(t.values.get("lora.enabled", True))
    _data(t)
    _tensor(t, adapters)
    _experts(t, adapters)
    _sequence(t)


def _data(t: Translation) -> None:
    """Sharding ranks read data of their own: they are our data processes, whose steps count all of them."""
    name = "sharding_parallel_degree"
    ranks = t.take(name, int, 1)
    if ranks <= 1:
        return
    key, accumulation = t.given[name].key, t.values["train.accumulation"]
    if t.take("global_batch_size", int, -1) > 0:
        if accumulation % ranks:
            t.note(
                f"{key} {ranks} -> 1: the {accumulation} micro-batches of global_batch_size cannot be dealt "
                f"out to {ranks} processes evenly",
                name,
            )
            return
    else:
        t.put("train.accumulation", ranks * accumulation, "gradient_accumulation_steps", name)
        t.note(
            f"{key} {ranks}: train.accumulation counts the micro-batches of all {ranks} processes together, "
            f"{ranks} x {accumulation}",
            name,
        )
    t.put("parallel.data", ranks, name)
    stage = _STAGES.get(t.take("sharding", str, "").strip())
    if stage == 3 and not t.take("recompute", bool, False):
        t.note("sharding stage3 -> stage2: here 3 needs recomputation", "sharding")
        stage = 2
    if stage:
        t.put("parallel.sharding", stage, "sharding")


def _tensor(t: Translation, adapters: bool) -> None:
    name = "tensor_parallel_degree"
    degree = t.take(name, int, 1)
    if degree <= 1:
        return
    if adapters:
        t.put("parallel.tensor", degree, name)
    else:
        t.note(f"{t.given[name].key} {degree} -> 1: here whole models are trained with data alone", name)


def _sequence(t: Translation) -> None:
    """A tensor group always cuts the rows between its products."""
    if not t.take("sequence_parallel", bool, False):
        return
    if t.values.get("parallel.tensor", 1) > 1:
        t.note("sequence_parallel: always so with parallel.tensor", "sequence_parallel")
        return
    alone = t.take("tensor_parallel_degree", int, 1) <= 1
    why = "it takes a tensor_parallel_degree above 1" if alone else "activations stay whole"
    t.note(f"sequence_parallel: without effect, {why}", "sequence_parallel")


def _experts(t: Translation, adapters: bool) -> None:
    name = "expert_parallel_degree"
    degree, data = t.take(name, int, 1), t.values.get("parallel.data", 1)
    if degree <= 1:
        return
    if adapters and data % degree == 0:
        t.put("parallel.expert", degree, name)
        return
    why = f"it must divide the {data} data processes" if adapters else "it needs adapters"
    t.note(f"{t.given[name].key} {degree} -> 1: here {why}", name)
