"""Gradients of a whole training step against torch's autograd through the transformers models, in fp32."""

import numpy as np
import pytest
import reference_adapters
import references
import tiny

from ernietune.checkpoint.load import load_model
from ernietune.data.collate import collate
from ernietune.data.dataset import Sample
from ernietune.lora import LoraSpec, adapters, inject, unfreeze
from ernietune.text.template import IGNORE
from ernietune.train.loop import accumulate
from ernietune.train.sft import sft

torch = references.torch
pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # per tensor: largest difference over largest value
MEAN = np.repeat(np.array([0.48145466, 0.4578275, 0.40821073]), 196)
STD = np.repeat(np.array([0.26862954, 0.26130258, 0.27577711]), 196)
TARGETS = {
    "dense": ("attention", "mlp"),
    "moe": ("attention", "mlp", "shared_experts", "experts"),
    "vl": ("attention", "mlp", "shared_experts", "experts", "vision", "resampler"),
}


@pytest.fixture(scope="module", params=list(references.BUILDERS))
def saved(request, tmp_path_factory):
    """(kind, transformers model, the folder it was saved to)."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = references.build(request.param)
    reference.save_pretrained(folder)
    return request.param, reference, folder


def sample(layout, grids=(), seed=0):
    """A document with a third of its tokens untrained, and uint8 pictures."""
    generator = np.random.default_rng(seed)
    ids, positions = tiny.document(layout, grids, seed, vocab=300)
    is_vision = np.isin(ids, list(tiny.TOKENS.values()))
    labels = np.where(is_vision | (generator.random(len(ids)) < 0.3), IGNORE, ids)
    patches = generator.integers(0, 256, (sum(h * w for _, h, w in grids), 588), dtype=np.uint8)
    grids = np.array(grids, np.int64).reshape(-1, 3)
    return Sample(ids, labels, is_vision, positions, patches, grids, "made by hand")


def samples(kind):
    texts = [sample([n], seed=n) for n in (9, 14, 6, 11)]
    if kind != "vl":
        return texts
    two = sample([4, "image", 3, "image", 6], [(1, 4, 6), (1, 8, 4)], seed=1)
    return [two, texts[0], sample([2, "image", 7], [(1, 6, 6)], seed=2), texts[1]]


def step(model, documents):
    """Two micro-batches, the first of two rows of which one is packed; returns the loss."""
    batches = [collate([documents[:2], documents[2:3]]), collate([documents[3:]])]
    return accumulate(model, sft, batches)[0]


def reference_loss(call, kind, documents):
    """The same step one document at a time: summed cross-entropies over all supervised tokens."""
    losses, count = [], 0
    for document in documents:
        pixels = ((document.patches / 255 - MEAN) / STD).astype(np.float32)
        extra = references.picture_inputs(document.ids, document.grids, [pixels]) if kind == "vl" else {}
        logits = call(input_ids=torch.tensor(document.ids)[None], **extra).logits[0]
        targets = torch.tensor(document.labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += int((targets != IGNORE).sum())
    return sum(losses) / count


def largest_deviation(pairs):
    """Compare {name: (ours, reference)} per tensor; print and return the worst relative difference."""
    worst = {}
    for name, (ours, expected) in pairs.items():
        scale = np.abs(expected).max()
        assert scale > 0, f"{name} has no gradient in the reference"
        worst[name] = float(np.abs(ours - expected).max() / scale)
    name = max(worst, key=worst.get)
    print(f"{len(pairs)} tensors, worst {worst[name]:.2e} ({name})")
    return worst[name]


@pytest.mark.parametrize(
    "spec", [{"rank": 4, "alpha": 6}, {"rank": 3, "alpha": 2.5, "rslora": True}], ids=str
)
def test_every_adapter(saved, spec):
    kind, reference, folder = saved
    model = load_model(folder)
    inject(model, LoraSpec(targets=TARGETS[kind], **spec))
    reference_adapters.randomize(model, seed=1)
    adapted = reference_adapters.Adapted(kind, reference, model)
    documents = samples(kind)
    expected = reference_loss(adapted, kind, documents)
    expected.backward()
    loss = step(model, documents)
    assert abs(loss - expected.item()) <= 1e-6 * expected.item()
    pairs = {}
    for path, layer in adapters(model):
        for letter, ours, theirs in zip(
            "AB", (layer.lora_A, layer.lora_B), adapted.factors[path], strict=True
        ):
            pairs[f"{path}.{letter}"] = ours.grad.numpy(), theirs.grad.numpy()
    print(f"{kind} {spec}: loss {loss:.6f}, difference {abs(loss - expected.item()):.1e}", end="; ")
    assert largest_deviation(pairs) <= TOLERANCE


def test_every_weight_of_a_full_fine_tune(saved):
    """Tied and untied heads, norms, routers, patch embedding, biases."""
    kind, reference, folder = saved
    model = load_model(folder)
    unfreeze(model, ("all", *(["router"] if kind != "dense" else [])))
    reference.zero_grad()
    documents = samples(kind)
    reference_loss(reference, kind, documents).backward()
    step(model, documents)
    theirs = dict(reference.named_parameters())
    pairs = {}
    for path, parameter in model.named_parameters():
        name, where = reference_adapters.place(kind, path, parameter.shape)
        pairs[path] = parameter.grad.numpy(), reference_adapters.part(theirs[name].grad, where).numpy()
    assert len(pairs) == len(list(model.named_parameters()))
    print(f"{kind} full", end=": ")
    assert largest_deviation(pairs) <= TOLERANCE


def test_a_frozen_base_gets_no_gradient(saved):
    kind, _, folder = saved
    model = load_model(folder)
    inject(model, LoraSpec(rank=2, targets=TARGETS[kind]))
    step(model, samples(kind))
    trained = {path for path, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{path}.{n}" for path, _ in adapters(model) for n in ("lora_A", "lora_B")}
