"""Our models against transformers 5.23 on the same random weights, in fp32."""

import numpy as np
import paddle
import pytest
import references
import tiny
from ernietune_kernels import linear_cross_entropy

from ernietune.checkpoint.load import load_model
from ernietune.models.decoder import Inputs
from ernietune.text.positions import positions_3d

torch = references.torch
pytestmark = pytest.mark.parity
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=list(references.BUILDERS))
def pair(request, tmp_path_factory):
    """(kind, transformers model, ours), ours loaded from what transformers saved."""
    return (request.param, *saved_and_loaded(request.param, tmp_path_factory))


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    return saved_and_loaded("vl", tmp_path_factory)


def saved_and_loaded(kind, factory):
    folder = factory.mktemp(kind)
    reference = references.build(kind)
    reference.save_pretrained(folder)
    return reference, load_model(folder)


def text_inputs(documents):
    """Packed text documents [(ids)] as Inputs."""
    lengths = [len(ids) for ids in documents]
    ids = np.concatenate(documents)
    return Inputs(
        ids=paddle.to_tensor(ids),
        positions=paddle.to_tensor(np.concatenate([positions_3d(n, [], []) for n in lengths])),
        visible_until=paddle.to_tensor(np.repeat(np.cumsum(lengths), lengths)),
        is_vision=paddle.to_tensor(np.zeros(len(ids), bool)),
    )


def ours(model, inputs):
    with paddle.no_grad():
        return model.logits(model(inputs)).numpy()


def report(name, actual, expected):
    error = float(np.abs(actual - expected).max())
    print(f"{name}: max abs difference {error:.2e} (values up to {np.abs(expected).max():.2f})")
    assert error <= TOLERANCE
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


def random_ids(count, seed):
    return np.random.default_rng(seed).integers(20, 300, count)


def test_text_rows_packed(pair):
    kind, reference, model = pair
    documents = [random_ids(17, 1), random_ids(5, 2), random_ids(9, 3)]
    extra = (lambda ids: references.picture_inputs(ids, [], [])) if kind == "vl" else (lambda ids: {})
    expected = np.concatenate([references.logits(reference, ids, **extra(ids)) for ids in documents])
    report(f"{kind} packed text", ours(model, text_inputs(documents)), expected)


def test_text_rows_padded_by_the_reference(pair):
    """The reference pads a batch of two; ours has no padding and must give the rows' own logits."""
    kind, reference, model = pair
    if kind == "vl":
        pytest.skip("padded vision-language rows are compared in test_padded_rows_with_pictures")
    documents = [random_ids(11, 4), random_ids(6, 5)]
    padded = np.zeros((2, 11), np.int64)
    mask = np.zeros((2, 11), np.int64)
    for row, ids in enumerate(documents):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    with torch.no_grad():
        out = reference(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask)).logits.numpy()
    expected = np.concatenate([out[row, : len(ids)] for row, ids in enumerate(documents)])
    report(f"{kind} padded text", ours(model, text_inputs(documents)), expected)


def test_loss(pair):
    kind, reference, model = pair
    ids = random_ids(23, 6)
    extra = references.picture_inputs(ids, [], []) if kind == "vl" else {}
    logits = torch.tensor(references.logits(reference, ids, **extra))
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    with paddle.no_grad():
        hidden = model(text_inputs([ids]))[:-1]
        losses = linear_cross_entropy(hidden, model.head_weight, paddle.to_tensor(ids[1:]), 7)
    assert abs(losses.mean().item() - expected) <= 1e-6


TWO_PICTURES = ([4, "image", 3, "image", 6], [(1, 4, 6), (1, 8, 4)])
ONE_PICTURE = ([2, "image", 5], [(1, 6, 6)])


def sequence(layout, grids, seed):
    """A document in the reference's vocabulary with its patches."""
    ids, positions = tiny.document(layout, grids, seed, vocab=300)
    assert {references.IMAGE, references.IMAGE_START} <= set(ids.tolist())
    return ids, positions, [tiny.picture(grid, seed + i) for i, grid in enumerate(grids)]


def test_pictures_of_different_sizes(vl):
    reference, model = vl
    ids, positions, patches = sequence(*TWO_PICTURES, seed=7)
    grids = TWO_PICTURES[1]
    expected = references.logits(reference, ids, **references.picture_inputs(ids, grids, patches))
    report("vl two pictures", ours(model, tiny.pack([(ids, positions)], grids, patches)), expected)


def test_positions(vl):
    reference, _ = vl
    ids, positions, patches = sequence(*TWO_PICTURES, seed=7)
    inputs = references.picture_inputs(ids, TWO_PICTURES[1], patches)
    expected, _ = reference.model.get_rope_index(
        torch.tensor(ids)[None], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    np.testing.assert_array_equal(positions, expected[:3, 0].numpy().T)


def test_packed_rows_with_pictures_and_text(vl):
    """Two documents with pictures and one of text in one row: each as if it were alone."""
    reference, model = vl
    first, second = sequence(*TWO_PICTURES, seed=8), sequence(*ONE_PICTURE, seed=9)
    text = random_ids(6, 10)
    expected = [
        references.logits(reference, d[0], **references.picture_inputs(d[0], grids, d[2]))
        for d, grids in ((first, TWO_PICTURES[1]), (second, ONE_PICTURE[1]))
    ]
    expected.insert(1, references.logits(reference, text, **references.picture_inputs(text, [], [])))
    documents = [first[:2], (text, positions_3d(6, [], [])), second[:2]]
    inputs = tiny.pack(documents, TWO_PICTURES[1] + ONE_PICTURE[1], first[2] + second[2])
    report("vl packed", ours(model, inputs), np.concatenate(expected))


def test_padded_rows_with_pictures(vl):
    reference, model = vl
    first, second = sequence(*TWO_PICTURES, seed=11), sequence(*ONE_PICTURE, seed=12)
    grids, patches = TWO_PICTURES[1] + ONE_PICTURE[1], first[2] + second[2]
    width = max(len(first[0]), len(second[0]))
    padded, mask = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    for row, document in enumerate((first, second)):
        padded[row, : len(document[0])], mask[row, : len(document[0])] = document[0], 1
    inputs = references.picture_inputs(padded.reshape(-1), grids, patches)
    inputs = {k: v.reshape(2, width) if "token_type" in k else v for k, v in inputs.items()}
    with torch.no_grad():
        out = reference(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), **inputs).logits
    expected = np.concatenate([out[row, : len(d[0])].numpy() for row, d in enumerate((first, second))])
    report("vl padded", ours(model, tiny.pack([first[:2], second[:2]], grids, patches)), expected)


def test_video_grid(vl):
    """Four frames; the reference has its own placeholder for video and its own rule for what follows one."""
    reference, model = vl
    grid = (4, 4, 6)
    count = 2 * 4 * 6 // 4
    ids = np.array(
        [30, 31, references.VIDEO_START, *[references.VIDEO] * count, references.VIDEO_END, 40, 41]
    )
    patches = [tiny.picture(grid, 13)]
    positions = positions_3d(len(ids), [(3, count)], [grid])
    inputs = references.picture_inputs(ids, [grid], patches, video=True)
    inputs["position_ids"] = torch.tensor(positions.T[:, None])
    expected = references.logits(reference, ids, **inputs)
    own_ids = np.where(ids == references.VIDEO, references.IMAGE, ids)
    report("vl video", ours(model, tiny.pack([(own_ids, positions)], [grid], patches)), expected)
