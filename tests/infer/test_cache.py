from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernietune.infer.cache import KVCache


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # shared with numpy, and sliced
def test_update_returns_all_rows_in_order_across_growth(dtype: str) -> None:
    generator = np.random.default_rng(0)
    cache, keys, values = KVCache(), [], []
    for count in (5, 1, 1, 300, 1, 700):
        k, v = (generator.standard_normal((count, 2, 4)).astype(dtype) for _ in "kv")
        keys.append(k)
        values.append(v)
        for layer in (0, 1):
            all_k, all_v = cache.update(layer, paddle.to_tensor(k) * (layer + 1), paddle.to_tensor(v))
            np.testing.assert_array_equal(all_k.numpy(), np.concatenate(keys) * np.array(layer + 1, dtype))
            np.testing.assert_array_equal(all_v.numpy(), np.concatenate(values))
    assert cache.tokens == 1008


def test_what_was_returned_stays_valid() -> None:
    cache = KVCache()
    first, _ = cache.update(0, paddle.ones([3, 1, 2]), paddle.ones([3, 1, 2]))
    cache.update(0, paddle.zeros([2000, 1, 2]), paddle.zeros([2000, 1, 2]))
    assert first.numpy().tolist() == [[[1.0, 1.0]]] * 3


def test_an_empty_cache_has_no_tokens() -> None:
    assert KVCache().tokens == 0
