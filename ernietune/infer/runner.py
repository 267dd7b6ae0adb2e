"""One forward pass over the new tokens of all scheduled sequences, one after the other, without padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from ernietune.infer.cache import PagedCache, Span, slots_of
from ernietune.infer.fused import FusedDecoder
from ernietune.infer.lowrank import LowRank, LowRankLayers
from ernietune.infer.scheduler import Chunk
from ernietune.infer.sequence import Medium
from ernietune.models.decoder import CausalLM, Inputs


class Runner:
    """The model with its cache: chunks of sequences in, logits out."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        block_size: int,
        feature_tokens: int,
        adapters: LowRankLayers,
    ) -> None:
        """`feature_tokens` is how many picture tokens are kept for requests that show the same picture."""
        self._model, self._cache, self._block_size = model, cache, block_size
        self._adapters = adapters
        self._features = FeatureCache(model, feature_tokens, adapters)
        config = model.config
        self._vision_ids = np.array(config.vision_token_ids if config.is_vl else (), np.int64)
        self._fused = FusedDecoder.of(model, cache.host)

    def forward(self, chunks: Items[Chunk], wanted: Items[int] | None = None) -> Tensor:
        """Hidden states of the chunks' tokens, whose keys and values are in the cache afterwards.

        [T, H], or [N, H] of the wanted ones, at least one. Chunks that use the same adapter stand together.
        """
        ids = np.concatenate([c.sequence.ids[c.start : c.stop] for c in chunks])
        positions = np.concatenate([c.sequence.positions[c.start : c.stop] for c in chunks])
        is_vision = np.isin(ids, self._vision_ids) if self._model.config.is_vl else None
        spans, fused = self._spans(chunks), self._fused
        with paddle.no_grad():
            if fused is not None and _bare_text(chunks, is_vision) and fused.suits(spans):
                return fused.forward(ids, positions, spans, wanted)
            features, rows = self._picture_features(chunks)
            inputs = Inputs(
                ids=paddle.to_tensor(ids),
                positions=paddle.to_tensor(positions),
                is_vision=None if is_vision is None else paddle.to_tensor(is_vision),
                features=features,
                feature_rows=rows,
            )
            step = self._cache.step(spans)
            if (
                wanted is not None and wanted and _bare(chunks)
            ):  # the rows of adapters are counted in all layers
                return self._model(replace(inputs, wanted_rows=_places(wanted)), step)
            with self._adapters.rows([(c.sequence.adapter, c.tokens) for c in chunks], is_vision):
                hidden = self._model(inputs, step)
            return hidden if wanted is None else _rows_of(hidden, wanted)

    def logits(self, hidden_TH: Tensor, rows: Items[int]) -> NDArray[np.float32]:
        """The logits [len(rows), V] behind these rows of the hidden states."""
        with paddle.no_grad():
            logits: NDArray[np.float32] = self._model.logits(_rows_of(hidden_TH, rows)).numpy()
        return logits

    def _spans(self, chunks: Items[Chunk]) -> list[Span]:
        spans, start = [], 0
        for chunk in chunks:
            slots = slots_of(chunk.sequence.blocks, self._block_size, chunk.stop)
            spans.append(Span(start, start + chunk.tokens, slots))
            start += chunk.tokens
        return spans

    def _picture_features(self, chunks: Items[Chunk]) -> tuple[Tensor | None, Tensor | None]:
        """(features [F, H], their rows [F] in the batch) of the picture tokens in these chunks."""
        features, rows, offset = [], [], 0
        for chunk in chunks:
            for medium in chunk.sequence.media:
                start, stop = max(chunk.start, medium.start), min(chunk.stop, medium.stop)
                if start < stop:
                    whole = self._features.of(medium, chunk.sequence.adapter)
                    features.append(whole[start - medium.start : stop - medium.start])
                    rows.append(np.arange(start, stop) - chunk.start + offset)
            offset += chunk.tokens
        if not features:
            return None, None
        return paddle.concat(features), paddle.to_tensor(np.concatenate(rows))


def _places(rows: Items[int]) -> Tensor:
    return paddle.to_tensor(np.array(rows, np.int64))


def _rows_of(hidden_TH: Tensor, rows: Items[int]) -> Tensor:
    return paddle.gather(hidden_TH, _places(rows))


def _bare(chunks: Items[Chunk]) -> bool:
    """No adapter anywhere."""
    return all(chunk.sequence.adapter is None for chunk in chunks)


def _bare_text(chunks: Items[Chunk], is_vision: NDArray[np.bool_] | None) -> bool:
    """No adapter, and no tokens for other experts than those of text."""
    return _bare(chunks) and (is_vision is None or not is_vision.any())


class FeatureCache:
    """The model's features of the pictures seen last, by their content (and the adapter that saw them)."""

    def __init__(self, model: CausalLM, tokens: int, adapters: LowRankLayers) -> None:
        """Keeps the features of at most so many picture tokens, and of the newest picture in any case."""
        self._model, self._room, self._adapters = model, tokens, adapters
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, medium: Medium, adapter: LowRank | None = None) -> Tensor:
        """The features [tokens, H] of a medium, computed where they are not known."""
        eyes = adapter if adapter is not None and adapter.sees else None
        key = medium.key if eyes is None else medium.key + eyes.key
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with self._adapters.rows([(eyes, len(medium.patches))]):
            features = self._model.picture_features(paddle.to_tensor(medium.patches), [medium.grid])
        self._kept[key] = features
        self._room -= features.shape[0]
        while self._room < 0 and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._room += oldest.shape[0]
        return features
