"""The estimate against counts and sizes worked out by hand, and what the command says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ernietune.cli import app
from ernietune.config import Config, load
from ernietune.errors import ConfigError
from ernietune.estimate.activations import decoder_block
from ernietune.estimate.changes import first_that_fits
from ernietune.estimate.report import AUTO_MODES, estimate, resolved
from ernietune.estimate.setup import GIB, Setup, setup_of
from ernietune.estimate.walk import walk
from ernietune.estimate.work import CARDS, cards_for, work
from ernietune.memory_modes import recompute_of, waits_on_host
from ernietune.models.config import SHAPES, ModelConfig
from ernietune.targets import parameter_table
from ernietune.train.plan import lora_spec

ROOT = Path(__file__).resolve().parent.parent.parent
VL = ROOT / "configs" / "vl28b" / "sft_lora_8k_1x80.yaml"


def setup(path: Path = VL, *overrides: str) -> Setup:
    config = load(path, list(overrides))
    shape = str(config.model.shape)
    return setup_of(config, ModelConfig.from_dict(SHAPES[shape], shape))


def needed(some: Setup) -> float:
    return estimate(some).needed / GIB


def test_weights_and_adapters_by_hand() -> None:
    """29,399,294,336 parameters in bf16 as published; routers in fp32: 27 layers of 2 x 64 rows."""
    parts = estimate(setup()).peak.parts
    routers = 27 * 2 * 64 * (2560 + 1)
    assert parts["weights"] + parts["vision weights"] == 2 * 29_399_294_336 + 2 * routers
    rows = parameter_table(setup().shapes, lora_spec(setup().config.lora))
    assert parts["adapters"] == 4 * sum(row.trainable for row in rows)
    assert parts["optimizer"] == 2 * parts["adapters"]


def test_a_dense_layer_by_hand() -> None:
    """0.3B at 1000 tokens in bf16: H 1024, Q 2048, K 256, 16 heads, I 3072, rank 32 on attention alone."""
    path = ROOT / "configs" / "0.3b" / "sft_lora_8k.yaml"
    block = decoder_block(setup(path, "data.max_length=1000", "lora.targets=[attention]"), 3)
    factors = 32 * ((1024 + 2048) + 2 * (1024 + 256) + (2048 + 1024))
    attention = 1000 * (3 * 2048 + 3 * 256) * 2 + 1000 * 4 * 16 + 4 * 1000 * 32 * 2 + 2 * factors
    assert block.attention.inside == attention + 4 * 1000  # the norm's scale of each row
    assert block.mlp.inside == 3 * 1000 * 3072 * 2 + 4 * 1000
    assert block.attention.norm == block.attention.input == 1000 * 1024 * 2
    assert block.gradients == 4 * factors


def test_full_tuning_keeps_fp32_copies() -> None:
    path = ROOT / "configs" / "0.3b" / "sft_lora_8k.yaml"
    parts = estimate(setup(path, "lora.enabled=false")).largest
    assert parts["optimizer"] == 12 * 360_748_032
    assert parts["gradients"] == 2 * 360_748_032
    assert parts["adapters"] == 0


def test_a_forward_of_two_operations_a_weight() -> None:
    """0.3B: 360,748,032 weights less norms; the tied table counts once, as the head."""
    path = ROOT / "configs" / "0.3b" / "sft_lora_8k.yaml"
    some = setup(path, "lora.targets=[attention]", "train.recompute=layers", "train.accumulation=2")
    tokens = 8192
    matrices = 360_748_032 - (2 * 18 + 1) * 1024
    scores = 18 * 2 * 2048 * 8192
    adapters = 2 * sum(some.adapted.values())
    assert work(some).forward == pytest.approx(2 * tokens * (2 * matrices + scores + adapters), rel=1e-6)
    layers = 2 * (matrices - 103_424 * 1024) + scores + adapters
    assert work(some).recompute == pytest.approx(2 * tokens * layers, rel=1e-6)


def test_only_chosen_experts_count() -> None:
    """3.4 billion weights of 21B-A3B meet a token: 6 of 64 experts, 2 shared ones; a little of adapters."""
    some = setup(ROOT / "configs" / "21b" / "sft_lora_8k.yaml", "data.max_length=128")
    attention = 28 * 2 * 2560 * (2560 + 512)
    experts = 27 * 3 * 2560 * 1536 * (6 + 2)
    weights = attention + experts + 3 * 2560 * 12288 + 103_424 * 2560
    assert weights == pytest.approx(3.35e9, rel=0.01)
    times = 2 * 128 * some.config.train.accumulation
    assert weights < work(some).forward / times < 1.04 * weights


def test_modes_need_less_in_their_order() -> None:
    sizes = [needed(setup(VL, f"train.recompute={mode}")) for mode in AUTO_MODES]
    assert sizes == sorted(sizes, reverse=True)
    assert needed(setup(VL, "train.offload=activations")) < sizes[-1]


def test_auto_takes_the_first_that_fits() -> None:
    for mode in AUTO_MODES:
        budget = needed(setup(VL, f"train.recompute={mode}")) + 0.01
        assert resolved(setup(VL, "train.recompute=auto"), budget).config.train.recompute == mode
    assert resolved(setup(VL, "train.recompute=auto"), 1).config.train.recompute == "layers"


@pytest.mark.parametrize(
    ("overrides", "memory", "change"),
    [
        (["train.recompute=none"], 80, "train.recompute="),
        (["lora.rank=32"], 79, "train.offload=activations"),
        (["lora.rank=64"], 72, "lora.rank="),
        (["data.max_length=131072", "model.quantization=wint8"], 46, "data.max_length="),
        (["data.max_length=1024", "lora.rank=4", "train.offload=activations+optimizer"], 17, "weights"),
        (["model.quantization=wint4"], 20, "parallel.data="),
    ],
)
def test_the_change_that_is_named_makes_it_fit(overrides: list[str], memory: float, change: str) -> None:
    some = setup(VL, *overrides)
    assert needed(some) > memory
    named = first_that_fits(some, memory)
    assert named is not None
    assert change in named
    told = [word for word in named.split() if "=" in word]
    assert needed(setup(VL, *overrides, *told)) <= memory


def test_no_change_is_enough() -> None:
    assert first_that_fits(setup(VL), 3) is None


TABLE = "model.embed_tokens.weight"
EIGHT = ["parallel.data=8", "parallel.expert=8", "train.accumulation=8"]


def test_experts_over_cards() -> None:
    one, eight = setup(), setup(VL, *EIGHT)
    experts = 27 * 64 * 3 * 2560 * (1536 + 512) * 2
    saved = walk(one).static["weights"] - walk(eight).static["weights"]
    assert saved == experts * 7 / 8
    rows = 8192 * 6 * 7 / 8 * 2560 * 2  # six experts a token, seven of eight on other cards, bf16
    assert estimate(eight).sent["rows of experts"] == 27 * 6 * rows


def test_a_tensor_group() -> None:
    """Heads, widths and the rows between products are divided; norms, routers and tower are not."""
    one, two = setup(), setup(VL, "parallel.tensor=2")
    routers = 27 * 2 * 64 * (2560 + 1) * 4
    words = 2 * 103_424 * 2560 * (one.shapes[TABLE] == two.shapes[TABLE])  # whole, unless they are divided
    whole = words + 2 * (2 * 28 + 1) * 2560 + routers
    resampler = sum(one.stored(path) for path in one.shapes if "resampler" in path)
    divided = walk(one).static["weights"] - whole - resampler
    assert walk(one).static["weights"] - walk(two).static["weights"] == divided / 2
    kept = [walk(some).peak.parts["activations"] for some in (one, two)]
    assert kept[1] == pytest.approx(kept[0] / 2, rel=0.05)
    sum_of_rows = two.micro_batches * 2 * 0.5 * 8192 * 2560 * 2
    layers = 28 * 6 * sum_of_rows  # two forward, two backward, two again; and the rows after all layers
    assert layers < estimate(two).sent["tensor group"] < layers + 4 * sum_of_rows
    # Of a divided matrix one factor is whole on both, and each has a part of its gradient.
    shared = 28 * 16 * 2560 * 4 + 27 * 64 * 2 * 3 * 16 * 2560
    assert estimate(two).sent["gradients"] == 2 * 0.5 * 4 * shared


def test_slices_of_the_base_and_of_what_trains() -> None:
    """Over two, with stage 3: half of every decoder layer, of its adapters, moments and gradients."""
    own = ["parallel.data=2", "train.accumulation=2"]
    whole = setup(VL, *own)
    sliced = setup(VL, *own, "parallel.base=sharded", "parallel.sharding=3")
    layers = sum(whole.stored(path) for path in whole.shapes if path.startswith("model.layers."))
    assert walk(whole).static["weights"] - walk(sliced).static["weights"] == pytest.approx(layers / 2)
    adapters = 4 * sum(whole.adapted.values())
    assert walk(sliced).static["adapters"] == pytest.approx(adapters / 2)
    assert walk(sliced).static["optimizer"] == pytest.approx(adapters)
    sent = estimate(sliced).sent
    assert sent["gathered layers"] == pytest.approx(2 * (layers + adapters) / 2)  # twice a half of all
    assert sent["gradients"] == pytest.approx(adapters / 2)


def test_stages_one_and_two_update_slices_beside_the_whole() -> None:
    own = ["parallel.data=2", "train.accumulation=4"]
    adapters = 4 * sum(setup().adapted.values())
    for stage, waiting in ((1, adapters), (2, adapters / 2)):
        some = setup(VL, *own, f"parallel.sharding={stage}")
        assert walk(some).static["adapters"] == pytest.approx(1.5 * adapters)
        assert walk(some).static["optimizer"] == pytest.approx(adapters)
        assert walk(some).moments[0].parts["gradients"] == pytest.approx(waiting)
        gathered = adapters / 2 * (2 + 1 if stage == 2 else 2)  # two micro-batches of this process
        assert estimate(some).sent["gradients"] == pytest.approx(gathered)


def test_what_waits_on_the_host() -> None:
    """Of 28 layers two are on the card: one that works, and the next."""
    plain, away = setup(), setup(VL, "train.offload=optimizer+weights")
    waiting = [plain.stored(path) for path in plain.shapes if waits_on_host(path)]
    assert sum(waiting) == pytest.approx(2 * (plain_matrices(plain)), rel=1e-9)
    before, after = (walk(some) for some in (plain, away))
    assert before.static["weights"] - after.static["weights"] == pytest.approx(sum(waiting))
    assert after.static["optimizer"] == 0
    numbers = sum(plain.adapted.values())
    found = estimate(away)
    assert found.host == {"optimizer": 12.0 * numbers, "weights": sum(waiting)}
    assert found.bus["weights"] == 2 * away.micro_batches * sum(waiting)
    assert found.bus["optimizer"] == 8.0 * numbers
    assert found.largest["layers in use"] == 2 * sum(waiting[-13:])  # attention 4, experts 9


def plain_matrices(some: Setup) -> int:
    """Numbers of attention, MLPs and experts of VL-28B, by its published widths."""
    attention = 28 * 2 * 2560 * (2560 + 512)
    experts = 27 * 3 * 2560 * (64 * (1536 + 512) + 2 * 1536)
    return attention + experts + 3 * 2560 * 12288


@pytest.mark.parametrize(
    ("scheme", "least", "most"),
    [("wint8", 1.0, 1.0), ("fp8", 1.0, 1.0), ("wint4", 0.5, 0.6), ("nf4", 0.5, 0.6), ("mixed", 0.5, 0.6)],
)
def test_quantised_weights(scheme: str, least: float, most: float) -> None:
    """Nearly all of 21B is in its layers, all but two of whose weights in a hundred are routed experts."""
    whole = setup(ROOT / "configs" / "21b" / "sft_lora_8k.yaml")
    size = walk(whole.changed(model__quantization=scheme)).static["weights"]
    layers = walk(whole).static["weights"] - 2 * 103_424 * 2560
    assert least * layers / 2 < size - 2 * 103_424 * 2560 < (most + 0.05) * layers / 2


def test_a_matrix_made_of_codes_counts_while_it_is_multiplied_with() -> None:
    """VL-28B on a CPU: one matrix of the dense MLP is 2560 x 12288, of the shared experts 2560 x 3072."""
    whole = setup()
    plain = setup_of(whole.config, whole.geometry, gpu=False)
    for form, each in (("wint8", 4), ("wint4", 4), ("nf4", 6), ("fp8", 12)):
        coded = plain.changed(model__quantization=form)
        for layer, numbers in ((0, 2560 * 12288), (1, 2560 * 3072)):
            before, after = (decoder_block(some, layer).mlp for some in (plain, coded))
            assert after.backward - before.backward == each * numbers
            assert after.forward - before.forward == each * numbers
            assert after.full == before.full
    on_card = whole.changed(model__quantization="wint8")
    assert decoder_block(on_card, 0).mlp == decoder_block(whole, 0).mlp  # kernels read the codes
    assert on_card.changed(model__quantization="nf4").widened("model.layers.0.mlp.") == 6 * 2560 * 12288


def test_a_bfloat16_head_is_widened_by_the_piece_on_a_cpu() -> None:
    """16 rows of labels: their logits are far fewer than the 2^24 numbers of the piece."""
    whole = setup(VL, "data.max_length=16")
    plain = setup_of(whole.config, whole.geometry, gpu=False).changed(image_tokens=0)
    losses = {}
    for some in (plain, plain.changed(model__quantization="wint8")):
        moments = [moment for moment in walk(some).moments if moment.name == "loss"]
        losses[some.config.model.quantization] = max(each.parts["cross-entropy"] for each in moments)
    logits = 4 * 16 * 103_424
    assert losses["wint8"] - losses["none"] == 4 * 2**24 - logits


def test_cards() -> None:
    assert [card.name for card in cards_for(80)] == ["A100 80 GB", "H100 SXM"]
    assert [card.name for card in cards_for(60)] == ["L40S"]
    least, most = work(setup()).seconds(CARDS[3])
    assert 0 < least < most


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = command(str(VL))
    assert "fits 80 GiB" in text
    assert "H100 SXM at 15% to 40% of 989 TFLOP/s bf16 (assumed, not measured)" in text
    text = command(str(VL), "--gpu-memory", "65")
    assert "does not fit 65 GiB what makes it fit:" in text
    text = command(str(VL), "--gpus", "8")
    assert "ranks 0 to 7, all alike" in text
    assert "rows of experts" in text
    found = json.loads(command(str(VL), "--json", "--image-tokens", "0", "train.recompute=auto"))
    assert found["fits"]
    assert found["recompute"] in AUTO_MODES
    assert found["image_tokens"] == 0
    assert found["needed"] > sum(found["peak"].values())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpu-memory", "0"], "--gpu-memory 0 must be above 0"),
        (["--gpus", "3"], "parallel.expert: 3 processes cannot share 64 experts"),
        (["--gpus", "2", "parallel.tensor=2"], "is for 2 processes already; leave it out"),
        (["--image-tokens", "9000"], "more than the 8192 tokens"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["estimate", str(VL), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert problem in str(result.exception)


def test_no_paddle() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from ernietune.cli import app
result = CliRunner().invoke(app, ["estimate", {str(VL)!r}])
assert result.exit_code == 0, result.output
assert not {{"paddle", "ernietune_kernels"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_modes_are_read_as_they_are_spelt() -> None:
    names = ("none", "layers", "every-3", "norm", "attention+moe+norm+activation")
    assert [recompute_of(name).name for name in names] == list(names)
    assert [recompute_of("every-3").whole(i) for i in range(4)] == [True, False, False, True]
    assert Config().train.recompute == "none"
