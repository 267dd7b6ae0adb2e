"""The safetensors reader and writer: exact bytes, exact rounding, and every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import struct

import numpy as np
import pytest

from ernietune.checkpoint import safetensors
from ernietune.checkpoint.dtypes import from_float32, to_float32
from ernietune.checkpoint.safetensors import Reader, TensorInfo, Writer, write_file
from ernietune.errors import CheckpointError

ARRAYS = {
    "odd": ("BF16", np.arange(3, dtype=np.uint16)),
    "matrix": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "half": ("F16", np.ones((2, 2), np.float16)),
    "scalar": ("I64", np.array(-7, np.int64)),
    "empty": ("F32", np.zeros((0, 4), np.float32)),
    "float8": ("F8_E4M3", np.array([0x38, 0xB8, 0x7E, 0x01], np.uint8)),
}


def write(folder, arrays=ARRAYS, **options):
    infos = [TensorInfo(name, dtype, data.shape) for name, (dtype, data) in arrays.items()]
    with Writer(folder, infos, **options) as writer:
        for name, (_, data) in arrays.items():
            writer.add(name, data)
    return folder


def check(folder, arrays=ARRAYS):
    reader = Reader(folder)
    assert {info.name for info in reader.infos} == arrays.keys()
    for name, (dtype, data) in arrays.items():
        assert reader.info(name) == TensorInfo(name, dtype, data.shape)
        np.testing.assert_array_equal(reader.array(name), data)


def test_single_file_round_trip_and_alignment(tmp_path):
    folder = write(tmp_path / "model")
    check(folder)
    assert os.listdir(folder) == ["model.safetensors"]
    data = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert header["matrix"]["data_offsets"][0] % 4 == 0  # although an odd number of BF16 comes first


def test_shards_and_index(tmp_path):
    folder = write(tmp_path / "model", max_shard_bytes=30)
    check(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1
    assert index["metadata"]["total_size"] == 6 + 24 + 8 + 8 + 0 + 4
    assert set(index["weight_map"]) == set(ARRAYS)
    assert set(index["weight_map"].values()) == set(shards)


def test_works_in_a_read_only_folder(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").chmod(0o444)
    folder.chmod(0o555)
    try:
        reader = Reader(folder)
        assert not reader.array("matrix").flags.writeable
        check(folder)
    finally:
        folder.chmod(0o755)


def test_other_libraries_agree(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {name: pair for name, pair in ARRAYS.items() if pair[0] not in ("BF16", "F8_E4M3")}
    found = library.load_file(write(tmp_path / "ours", plain) / "model.safetensors")
    for name, (_, data) in plain.items():
        np.testing.assert_array_equal(found[name], data)
    library.save_file(
        {name: np.asarray(data) for name, (_, data) in plain.items()}, tmp_path / "theirs.safetensors"
    )
    check(tmp_path / "theirs.safetensors", plain)


def rewrite_header(path, change):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_offsets(header, name, start, end):
    header[name]["data_offsets"] = [start, end]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: set_offsets(h, "b", 0, 8), r"tensor b starts at byte 0, expected 8|tensor a starts at"),
        (lambda h: set_offsets(h, "b", 12, 20), "tensor b starts at byte 12, expected 8"),
        (lambda h: set_offsets(h, "b", 8, 12), "takes 8 bytes, the header gives it 4"),
        (lambda h: set_offsets(h, "b", -8, 0), "malformed"),
        (lambda h: h["b"].update(dtype="Q4"), "tensor b has the unknown dtype Q4"),
        (lambda h: h["b"].update(shape=[2, "x"]), "malformed"),
        (lambda h: h["b"].pop("shape"), "malformed"),
        (lambda h: h.pop("b"), "holds 16 bytes of tensors, its header describes 8"),
    ],
)
def test_damaged_headers(tmp_path, change, message):
    two = {name: ("F32", np.ones(2, np.float32)) for name in "ab"}
    path = write(tmp_path / "model", two) / "model.safetensors"
    rewrite_header(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Reader(path.parent)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files(tmp_path, keep):
    path = write(tmp_path / "model") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Reader(path.parent)


def test_index_that_lies(tmp_path):
    folder = write(tmp_path / "model", max_shard_bytes=30)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))

    def broken(message, **changes):
        index_file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changes}}))
        with pytest.raises(CheckpointError, match=message):
            Reader(folder)

    broken("shards that are not there: gone.safetensors", odd="gone.safetensors")
    broken("places tensor odd", odd=next(s for s in shards if s != index["weight_map"]["odd"]))
    broken("places tensor new", new=shards[0])
    broken("no file name in that folder", odd="../model.safetensors")
    less = {name: shard for name, shard in index["weight_map"].items() if name != "matrix"}
    index_file.write_text(json.dumps({"weight_map": less}))
    with pytest.raises(CheckpointError, match=r"does not list these tensors of its shards: matrix"):
        Reader(folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Reader(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds neither .* found pytorch_model\.bin"):
        Reader(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    original = safetensors._OutFile.write

    def full(self, name, data):
        original(self, name, data)
        if name == "half":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors._OutFile, "write", full)
    with pytest.raises(CheckpointError, match=r"No space left on device\); nothing was left behind"):
        write(tmp_path / "model", max_shard_bytes=30)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    infos = [TensorInfo("a", "F32", (2,)), TensorInfo("b", "F32", (2,))]

    def interrupted():
        with Writer(tmp_path / "model", infos) as writer:
            writer.add("a", np.ones(2, np.float32))
            assert any((tmp_path / "model").iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "model").exists()


def test_an_unwritable_place_is_a_plain_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be created"):
        write(tmp_path / "file" / "model")


def test_an_existing_model_is_not_overwritten(tmp_path):
    folder = write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="already holds a model"):
        write(folder)
    check(folder)


def test_write_file_replaces_atomically(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    write_file(path, ARRAYS)
    write_file(path, {"matrix": ARRAYS["matrix"]})
    check(path, {"matrix": ARRAYS["matrix"]})
    assert os.listdir(tmp_path) == [path.name]


def test_bfloat16_rounds_to_nearest_even():
    # 1 + 2^-8 lies exactly between 1 and 1 + 2^-7; ties go to the even mantissa
    cases = {
        1.0: 0x3F80,
        1 + 2**-8: 0x3F80,
        1 + 2**-7: 0x3F81,
        1 + 3 * 2**-8: 0x3F82,
        1 + 2**-8 + 2**-20: 0x3F81,
        -0.0: 0x8000,
        3.4e38: 0x7F80,  # above the largest bfloat16: infinity
        float("inf"): 0x7F80,
        1e-40: 0x0001,  # subnormal
    }
    found = from_float32(np.array(list(cases), np.float32), "BF16")
    assert [hex(x) for x in found] == [hex(x) for x in cases.values()]


def test_bfloat16_keeps_nan_and_every_bit_pattern():
    all_bits = np.arange(65536, dtype=np.uint16)
    numbers = to_float32(all_bits, "BF16")
    back = from_float32(numbers, "BF16")
    nan = np.isnan(numbers)
    np.testing.assert_array_equal(back[~nan], all_bits[~nan])
    assert np.isnan(to_float32(back[nan], "BF16")).all()
    loud = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(loud, "BF16"), "BF16")).all()


def test_rounding_error_is_at_most_half_a_step():
    numbers = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    back = to_float32(from_float32(numbers, "BF16"), "BF16")
    step = 2.0 ** (np.floor(np.log2(np.abs(numbers.astype(np.float64)))) - 7)
    assert (np.abs(back.astype(np.float64) - numbers) <= step / 2).all()


def test_float8_values():
    e4m3 = to_float32(np.array([0x00, 0x01, 0x08, 0x38, 0xB8, 0x7E, 0x7F], np.uint8), "F8_E4M3")
    np.testing.assert_array_equal(e4m3, [0, 2**-9, 2**-6, 1, -1, 448, np.nan])
    e5m2 = to_float32(np.array([0x3C, 0x7B, 0xFC], np.uint8), "F8_E5M2")
    np.testing.assert_array_equal(e5m2, [1, 57344, -np.inf])


def test_integers_are_no_weights():
    with pytest.raises(CheckpointError, match="I64"):
        to_float32(np.zeros(2, np.int64), "I64")
