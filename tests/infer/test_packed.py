"""Engines over stored weights: equal to the plain model where they must be, near it where they may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernietune.checkpoint.load import load_model
from ernietune.checkpoint.packed import load_packed
from ernietune.errors import ConfigError
from ernietune.infer import memory, precision
from ernietune.infer.cache import Span
from ernietune.infer.engine import Engine
from ernietune.infer.precision import Precision
from ernietune.infer.request import SamplingParams
from ernietune.initialize import initialize
from ernietune.lora import LoraSpec, adapters, inject
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM, Inputs
from ernietune.models.forms import TRAINING
from ernietune.models.packed import SCHEMES, convert, packed_layers, stored_bytes
from tests import tiny
from tests.fakes import ByteTokenizer, PlainTemplate

SHAPES = ["tiny-dense", "tiny-moe", "tiny-vl"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {shape: initialize(shape, root / shape, seed=3) for shape in SHAPES}


def logits(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    inputs = Inputs(
        ids=paddle.to_tensor(ids),
        positions=paddle.to_tensor(np.arange(len(ids))[:, None].repeat(3, 1)),
        is_vision=paddle.zeros([len(ids)], "bool") if model.config.is_vl else None,
    )
    with paddle.no_grad():
        return model.logits(model(inputs)).numpy()


def prompt() -> np.ndarray:
    return np.random.default_rng(1).integers(300, 600, 40)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Of the whole; one row may be far off where two experts are nearly as good as each other."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scheme", "tolerance"), [("bfloat16", 1e-4), ("wint8", 0.03), ("wint4", 0.4)])
def test_logits_are_near_those_of_fp32(
    folders: dict[str, Path], shape: str, scheme: str, tolerance: float
) -> None:
    config = ModelConfig.from_folder(folders[shape])
    plain = load_model(folders[shape], "float32")
    packed, _ = load_packed(folders[shape], SCHEMES[scheme], config)
    assert relative_error(logits(packed, prompt()), logits(plain, prompt())) < tolerance


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_both_layouts_give_the_same_codes(tmp_path: Path, layout: str) -> None:
    folder = initialize("tiny-moe", tmp_path / "model", layout=layout, seed=3)
    other = initialize("tiny-moe", tmp_path / "other", seed=3)
    models = [load_packed(f, SCHEMES["wint8"], ModelConfig.from_folder(f))[0] for f in (folder, other)]
    np.testing.assert_array_equal(*(logits(model, prompt()) for model in models))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_weights_say_the_same_tokens_as_fp32(folders: dict[str, Path], shape: str) -> None:
    answers = []
    for form in (Precision("float32"), Precision("bfloat16")):
        engine = Engine.load(folders[shape], max_length=128, precision=form)
        assert (engine._loop.core.runner._fused is None) == (form.dtype == "float32")
        answers.append([engine.generate(engine.prepare_ids(prompt()[:n]), GREEDY).ids for n in (1, 9, 40)])
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["bfloat16", "wint8", "wint4", "mixed"])
def test_a_fused_step_is_the_step_of_the_layers(folders: dict[str, Path], shape: str, scheme: str) -> None:
    config = ModelConfig.from_folder(folders[shape])
    model, _ = load_packed(folders[shape], SCHEMES[scheme], config)
    model.eval()
    news = [(1, 0, 0), (0, 20, 0), (0, 0, 27), (1, 1, 1), (3, 1, 7), (1, 2, 1)]
    one, other = (steps(engine, news, 64) for engine in with_and_without_c(model, 64))
    assert relative_error(one, other) < (1e-2 if scheme in ("wint4", "mixed") else 1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(10, 2, 40), (16, 2, 16), (4, 4, 64), (3, 1, 128)])
def test_a_fused_step_of_several_tokens_over_many_keys(heads: int, kv_heads: int, width: int) -> None:
    """More keys and more queries than the C holds at a time, and every kind of neighbour in the step."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}
    plain = tiny.model("tiny-dense", **changes)
    model = CausalLM(plain.config)
    convert(model, SCHEMES["bfloat16"])
    for path, layer in packed_layers(model):
        source = plain.model.embed_tokens if path == "lm_head" else dict(plain.named_sublayers())[path]
        layer.take(source.weight.astype("bfloat16"))
    for name, tensor in model.state_dict().items():
        tensor.set_value(plain.state_dict()[name])
    model.eval()
    news = [(30, 1, 1)] * 6 + [(1, 1, 1), (2, 17, 5), (1, 29, 1), (40, 200, 1)]
    one, other = (steps(engine, news, 300) for engine in with_and_without_c(model, 300))
    assert relative_error(one, other) < 1e-4


def with_and_without_c(model: CausalLM, room: int) -> Iterator[Engine]:
    """An engine that takes the fused steps, and one that does not."""
    for fused in (True, False):
        engine = Engine(model, ByteTokenizer(), PlainTemplate(), max_length=room)  # type: ignore[arg-type]
        runner = engine._loop.core.runner
        assert runner._fused is not None
        if not fused:
            runner._fused = None
        yield engine


def steps(engine: Engine, steps_of_news: Sequence[Sequence[int]], room: int) -> np.ndarray:
    """Logits of three sequences; each step says how many tokens each of them reads."""
    runner, model, found = engine._loop.core.runner, engine.model, []

    def forward(ids: np.ndarray, positions: np.ndarray, spans: list[Span]) -> None:
        fused = runner._fused
        with paddle.no_grad():
            if fused is not None:
                wanted = range(0, len(ids), 3)
                some = fused.forward(ids, positions, spans, wanted).numpy()
                hidden = fused.forward(ids, positions, spans)
                assert relative_error(some, hidden.numpy()[::3]) < 5e-3  # int4 in few or many rows
            else:
                vision = paddle.zeros([len(ids)], "bool") if model.config.is_vl else None
                inputs = Inputs(paddle.to_tensor(ids), paddle.to_tensor(positions), is_vision=vision)
                hidden = model(inputs, runner._cache.step(spans))
            found.append(model.logits(hidden).numpy())

    ids = np.random.default_rng(1).integers(10, 200, room)
    slots, lengths = [np.arange(room)[::-1] + room * i for i in range(3)], [0, 0, 0]
    for news in steps_of_news:
        spans, places = [], []
        for sequence, new in enumerate(news):
            if new:
                lengths[sequence] += new
                seen = slots[sequence][: lengths[sequence]]
                spans.append(Span(len(places), len(places) + new, seen))
                places += range(lengths[sequence] - new, lengths[sequence])
        at = np.array(places)
        forward(ids[at], at[:, None].repeat(3, 1), spans)
    return np.concatenate(found)


def test_a_long_past_is_read_once_for_all_tokens(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C reads keys again for every few tokens: it is for one token, or few pairs of tokens and keys."""
    engine = Engine.load(folders["tiny-moe"], max_length=64)
    fused = engine._loop.core.runner._fused
    assert fused is not None

    def spans(new: int, length: int, count: int = 1) -> list[Span]:
        return [Span(i * new, (i + 1) * new, np.arange(length)) for i in range(count)]

    assert fused.suits(spans(1, 10**6))
    assert fused.suits(spans(16, 2048))
    assert not fused.suits(spans(2, 10**6))
    assert fused.suits(spans(1, 9, 32))
    monkeypatch.setattr(fused._decode.library, "takes_many_rows", False)
    assert not fused.suits(spans(1, 9, 33))
    assert not fused.suits(spans(33, 33))
    monkeypatch.setattr(fused._decode.library, "takes_many_rows", True)
    assert fused.suits(spans(1, 9, 33))
    assert fused.suits(spans(512, 512))
    assert not fused.suits(spans(33, 10**4))
    assert not fused.suits(spans(513, 513))


def test_an_adapter_goes_around_packed_layers(folders: dict[str, Path]) -> None:
    spec, results = LoraSpec(rank=4), []
    config = ModelConfig.from_folder(folders["tiny-moe"])
    models = [
        load_model(folders["tiny-moe"], "float32"),
        load_packed(folders["tiny-moe"], SCHEMES["bfloat16"], config)[0],
    ]
    for model in models:
        assert inject(model, spec)
        for seed, (_, adapter) in enumerate(adapters(model)):
            values = np.random.default_rng(seed).standard_normal(adapter.lora_B.shape)
            adapter.lora_B.set_value(0.05 * values.astype(np.float32))
            values = np.random.default_rng(seed).standard_normal(adapter.lora_A.shape)
            adapter.lora_A.set_value(0.05 * values.astype(np.float32))
        model.eval()
        results.append(logits(model, prompt()))
    assert [path for path, _ in adapters(models[0])] == [path for path, _ in adapters(models[1])]
    assert relative_error(results[1], results[0]) < 1e-4


def test_widths_without_an_int4_group_stay_int8_and_are_named() -> None:
    model = CausalLM(tiny.config("tiny-dense", intermediate_size=80))
    notes = convert(model, SCHEMES["wint4"])
    assert notes == ["down_proj has 80 inputs, which no int4 group divides: it is int8"]
    bits = {path.rpartition(".")[2]: layer.form.bits for path, layer in packed_layers(model)}
    assert (bits["down_proj"], bits["up_proj"], bits["lm_head"], bits["embed_tokens"]) == (8, 4, 8, 16)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_told_beforehand_are_those_taken(folders: dict[str, Path], shape: str, scheme: str) -> None:
    config = ModelConfig.from_folder(folders[shape])
    model, _ = load_packed(folders[shape], SCHEMES[scheme], config)
    assert memory.weight_bytes(config, scheme) == pytest.approx(stored_bytes(model), rel=0.12)


def test_a_model_that_does_not_fit_is_refused_before_loading(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_folder(folders["tiny-moe"])
    room = memory.weight_bytes(config, "wint8") + 1
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    with pytest.raises(ConfigError, match="as float32 but .* are free; choose --quantization wint8 or"):
        Engine.load(folders["tiny-moe"], precision=Precision("float32"))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="use a machine with more memory"):
        Engine.load(folders["tiny-moe"], precision=Precision(quantization="wint4"))


def test_the_plan_says_what_the_engine_holds(folders: dict[str, Path]) -> None:
    engine = Engine.load(folders["tiny-dense"], max_length=64, precision=Precision("bfloat16"))
    plan, config = engine.memory_plan(), engine.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert plan.cache == 16 * 64 * per_token  # sixteen sequences at full length
    assert f"{plan.blocks} blocks of 16 tokens" in str(plan)
    assert str(plan).endswith("largest request 64 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half", None), "--dtype half is unknown; choose one of auto, float32, bfloat16"),
        (("auto", "int3"), "--quantization int3 is unknown; choose one of wint8, wint4, mixed"),
        (("float32", "wint8"), "contradicts --dtype float32"),
    ],
)
def test_bad_choices_name_the_good_ones(arguments: tuple[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Precision(*arguments)


@pytest.mark.parametrize("form", ["wint8", "wint4", "mixed", "fp8"])
def test_on_a_gpu_codes_are_those_of_a_frozen_base(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """What a GPU would hold; here on a CPU, so nothing is computed with it."""
    monkeypatch.setattr(precision, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    config = ModelConfig.from_folder(folders["tiny-moe"])
    found = Precision(quantization=form).load(folders["tiny-moe"], config)
    wanted = load_packed(folders["tiny-moe"], TRAINING[form].keeping_the_rest(), config, "bfloat16")[0]
    forms = {path: layer.form for path, layer in packed_layers(found)}
    assert forms == {path: layer.form for path, layer in packed_layers(wanted)}
    assert all(form.frozen for form in forms.values())
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.text_experts.up_proj"} <= forms.keys()
    assert found.model.norm.weight.dtype == paddle.bfloat16
    assert "model.embed_tokens" not in forms


def test_fp8_is_for_gpus_that_have_it(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_folder(folders["tiny-moe"])
    with pytest.raises(ConfigError, match="fp8 needs a GPU; choose one of wint8, wint4, mixed"):
        Precision(quantization="fp8").load(folders["tiny-moe"], config)
    monkeypatch.setattr(precision, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8.9 or later and this one has 8.0; use wint8"):
        Precision(quantization="fp8").load(folders["tiny-moe"], config)


def test_a_checkpoint_of_fp32_stays_fp32(tmp_path: Path) -> None:
    folder = initialize("tiny-dense", tmp_path / "model", dtype="float32")
    assert not list(packed_layers(Engine.load(folder, max_length=64).model))
