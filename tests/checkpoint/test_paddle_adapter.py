"""Adapters in the layout of ERNIEKit and PaddleFormers: sums against merged weights, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ernietune.checkpoint.adapter import Adapter, read_adapter
from ernietune.checkpoint.paddle_adapter import read_paddle_adapter, write_paddle_adapter
from ernietune.checkpoint.safetensors import Reader, write_file
from ernietune.checkpoint.start import Start
from ernietune.convert_adapter import convert
from ernietune.errors import CheckpointError
from ernietune.export import export
from ernietune.initialize import initialize
from ernietune.models.config import ModelConfig
from ernietune.targets import LoraSpec

RANK, ALPHA = 3, 12
Arrays = dict[str, NDArray[np.float32]]
HEADS, GROUPS, SIZE, HIDDEN = 4, 2, 32, 96  # of tiny-vl: checked below


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(initialize("tiny-vl", tmp_path_factory.mktemp("base") / "tiny-vl", dtype="float32"))


@pytest.fixture(scope="module")
def config(base: Path) -> ModelConfig:
    found = ModelConfig.from_folder(base)
    sizes = found.num_attention_heads, found.num_key_value_heads, found.head_dim, found.hidden_size
    assert sizes == (HEADS, GROUPS, SIZE, HIDDEN)
    return found


def pair(name: str, inputs: int, outputs: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    shapes = {"lora_A": (inputs, RANK), "lora_B": (RANK, outputs)}
    return {f"{name}.{k}": random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def write_config(folder: Path, base: Path, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    plain = {"r": RANK, "lora_alpha": ALPHA, "rslora": False, "base_model_name_or_path": str(base)}
    (folder / "lora_config.json").write_text(json.dumps(plain | values))


def theirs(folder: Path, base: Path, tensors: Arrays, **values: Any) -> Path:
    write_config(folder, base, **values)
    write_file(folder / "peft_model.safetensors", {name: ("F32", array) for name, array in tensors.items()})
    return folder


def delta(adapter: Adapter, path: str, index: int | None = None) -> NDArray[np.float32]:
    """[in, out], as their layers have it."""
    a, b = adapter.factors[path, index]
    return adapter.spec.scale * (b @ a).T


def test_plain_layers_and_single_experts(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    q, expert = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.2.down_proj"
    inner = config.pools[0].intermediate_size
    tensors = pair(q, HIDDEN, HEADS * SIZE) | pair(expert, inner, HIDDEN, 1)
    adapter = read_paddle_adapter(theirs(tmp_path / "a", base, tensors), config)
    for key, name in (((q, None), q), (("model.layers.1.mlp.text_experts.down_proj", 2), expert)):
        wanted = ALPHA / RANK * tensors[f"{name}.lora_A"] @ tensors[f"{name}.lora_B"]
        np.testing.assert_allclose(delta(adapter, *key), wanted, rtol=1e-5, atol=1e-5)
    assert adapter.base == str(base)


@pytest.mark.parametrize("root", ["ernie", "model"])
def test_fused_layers_become_one_for_each_part(
    tmp_path: Path, base: Path, config: ModelConfig, root: str
) -> None:
    """The sum of the fused layer, cut as the forward pass of either library cuts its output."""
    fused, both = f"{root}.layers.0.self_attn.qkv_proj", f"{root}.layers.0.mlp.up_gate_proj"
    tensors = pair(fused, HIDDEN, (HEADS + 2 * GROUPS) * SIZE)
    tensors |= pair(both, HIDDEN, 2 * config.intermediate_size, 1)
    adapter = read_paddle_adapter(theirs(tmp_path / "a", base, tensors, rslora=True), config)
    whole = ALPHA / RANK**0.5 * tensors[f"{fused}.lora_A"] @ tensors[f"{fused}.lora_B"]
    if root == "ernie":
        parts = np.split(whole, [HEADS * SIZE, (HEADS + GROUPS) * SIZE], axis=1)
    else:
        grouped = whole.reshape(HIDDEN, GROUPS, (HEADS // GROUPS + 2) * SIZE)
        parts = np.split(grouped, [HEADS // GROUPS * SIZE, (HEADS // GROUPS + 1) * SIZE], axis=2)
    for name, part in zip("qkv", parts, strict=True):
        found = delta(adapter, f"model.layers.0.self_attn.{name}_proj")
        np.testing.assert_allclose(found, part.reshape(HIDDEN, -1), rtol=1e-5, atol=1e-5)
    halves = np.split(ALPHA / RANK**0.5 * tensors[f"{both}.lora_A"] @ tensors[f"{both}.lora_B"], 2, axis=1)
    for name, half in zip(("gate", "up"), halves, strict=True):
        np.testing.assert_allclose(
            delta(adapter, f"model.layers.0.mlp.{name}_proj"), half, rtol=1e-5, atol=1e-5
        )


def test_converted_it_merges_into_the_base(tmp_path: Path, base: Path) -> None:
    name = "ernie.layers.0.self_attn.qkv_proj"
    tensors = pair(name, HIDDEN, (HEADS + 2 * GROUPS) * SIZE)
    folder = theirs(tmp_path / "theirs", base, tensors)
    with pytest.raises(CheckpointError, match=r"layout of ERNIEKit .* ernietune adapter convert"):
        export(folder, tmp_path / "no")
    with pytest.raises(CheckpointError, match="ernietune adapter convert"):
        Start.find(str(folder))
    said = convert(folder, tmp_path / "ours")
    assert said == f"3 layers, rank 3, in PEFT's layout: {tmp_path / 'ours'}"
    export(tmp_path / "ours", tmp_path / "merged")
    key = "model.layers.0.self_attn.v_proj.weight"
    change = Reader(tmp_path / "merged").float32(key) - Reader(base).float32(key)
    whole = ALPHA / RANK * tensors[f"{name}.lora_A"] @ tensors[f"{name}.lora_B"]
    np.testing.assert_allclose(change, whole[:, (HEADS + GROUPS) * SIZE :].T, atol=1e-5)


def test_there_and_back_is_the_same(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    tensors: Arrays = {}
    for number in range(config.num_hidden_layers):
        tensors |= pair(f"model.layers.{number}.self_attn.o_proj", HEADS * SIZE, HIDDEN, number)
    convert(theirs(tmp_path / "theirs", base, tensors), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", str(base))
    reader = Reader(tmp_path / "again" / "peft_model-00001-of-00001.safetensors")
    assert {info.name for info in reader.infos} == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(reader.float32(name), array)
    assert json.loads((tmp_path / "again" / "lora_config.json").read_text())["target_modules"] == [
        r".*\.o_proj"
    ]


def test_targets_say_what_is_adapted(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    """So that the adapter can be put on the model again, to train on or to serve."""
    tensors: Arrays = {}
    for number in range(config.num_hidden_layers):
        root = f"ernie.layers.{number}.self_attn"
        tensors |= pair(f"{root}.qkv_proj", HIDDEN, (HEADS + 2 * GROUPS) * SIZE)
        tensors |= pair(f"{root}.o_proj", HEADS * SIZE, HIDDEN)
    tensors |= pair("ernie.layers.0.mlp.down_proj", config.intermediate_size, HIDDEN)
    convert(theirs(tmp_path / "theirs", base, tensors), tmp_path / "ours")
    spec = read_adapter(config, tmp_path / "ours").spec
    assert spec == LoraSpec(RANK, ALPHA, ("attention", r"model\.layers\.0\.mlp\.down_proj"))


def test_a_pickled_file_is_read_as_arrays_only(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    name = "model.layers.0.self_attn.o_proj"
    tensors = pair(name, HEADS * SIZE, HIDDEN)
    write_config(tmp_path / "a", base)
    file = tmp_path / "a" / "lora_model_state.pdparams"
    halves = (tensors[f"{name}.lora_B"].view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut
    content = {f"{name}.lora_A": tensors[f"{name}.lora_A"], f"{name}.lora_B": ("linear_0.w_0", halves)}
    file.write_bytes(pickle.dumps(content, protocol=4))
    adapter = read_paddle_adapter(tmp_path / "a", config)
    wanted = ALPHA / RANK * tensors[f"{name}.lora_A"] @ tensors[f"{name}.lora_B"]
    np.testing.assert_allclose(delta(adapter, name), wanted, rtol=0.05, atol=0.1)
    file.write_bytes(pickle.dumps({"x": Path("/")}))
    with pytest.raises(CheckpointError, match=r"cannot be read as arrays \(it asks for pathlib"):
        read_paddle_adapter(tmp_path / "a", config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pissa": True}, "pissa is True"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree is above 1"),
        ({"scaling": 1.0}, "scaling is 1.0, but r, lora_alpha and rslora give 4"),
        ({"r": 4}, r"o_proj.lora_A expected \[128, 4\] found \[128, 3\]"),
    ],
)
def test_what_would_be_another_sum_is_refused(
    tmp_path: Path, base: Path, config: ModelConfig, values: dict[str, Any], message: str
) -> None:
    tensors = pair("model.layers.0.self_attn.o_proj", HEADS * SIZE, HIDDEN)
    with pytest.raises(CheckpointError, match=message):
        read_paddle_adapter(theirs(tmp_path / "a", base, tensors, **values), config)


def test_what_is_no_factor_of_the_model_is_refused(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    good = pair("model.layers.0.self_attn.o_proj", HEADS * SIZE, HIDDEN)
    with pytest.raises(CheckpointError, match="model.norm.weight is no LoRA factor"):
        read_paddle_adapter(
            theirs(tmp_path / "a", base, good | {"model.norm.weight": good.popitem()[1]}), config
        )
    with pytest.raises(CheckpointError, match="lora_B is missing"):
        read_paddle_adapter(theirs(tmp_path / "b", base, good), config)
    strange = pair("model.layers.9.self_attn.o_proj", 2, 2)
    with pytest.raises(CheckpointError, match=r"layers.9.self_attn.o_proj is no layer"):
        read_paddle_adapter(theirs(tmp_path / "c", base, strange), config)
    write_config(tmp_path / "d", base)
    with pytest.raises(CheckpointError, match=r"has neither peft_model\*.safetensors nor"):
        read_paddle_adapter(tmp_path / "d", config)


def test_their_own_library_reads_what_we_write(tmp_path: Path, base: Path, config: ModelConfig) -> None:
    """PaddleNLP's LoRAModel, around Paddle layers of these names, gives the sums of the adapter."""
    peft = pytest.importorskip("paddlenlp.peft", exc_type=ImportError)
    import paddle

    name, width = "model.layers.0.self_attn.o_proj", HEADS * SIZE
    a, b = pair(name, width, HIDDEN).values()
    written = Adapter(LoraSpec(RANK, ALPHA), str(base), {(name, None): (a.T, b.T)})
    (tmp_path / "out").mkdir()
    write_paddle_adapter(tmp_path / "out", written, config)
    model = paddle.nn.Layer()
    parent = model
    for part in name.split(".")[:-1]:
        parent.add_sublayer(part, paddle.nn.Layer())
        parent = parent._sub_layers[part]
    parent.add_sublayer("o_proj", paddle.nn.Linear(width, HIDDEN, bias_attr=False))
    model.config = SimpleNamespace(tensor_parallel_degree=1)
    adapted = peft.LoRAModel.from_pretrained(model, str(tmp_path / "out"))
    adapted.eval()
    layer = dict(adapted.named_sublayers())[f"model.{name}"]
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    found = layer(paddle.to_tensor(x)).numpy() - x @ layer.weight.numpy()
    np.testing.assert_allclose(found, x @ delta(written, name), rtol=1e-4, atol=1e-3)
