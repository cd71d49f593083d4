"""A key-value cache whose layers hold only the rows that run them.

A decision is made once per sequence, so a row skips the same sublayers at every step. Its keys and values are never
stored. The length and the order of the beams must still be right for all rows, even in a layer that stores no row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache


class RowSubsetLayer(CacheLayerMixin):
    """One layer of a cache that holds the keys and values of some rows; it replaces Hugging Face's layer.

    ``inner`` stores ``[kept, heads, stored length, head size]`` of ``rows`` (int64 ``[kept]``, ``None``: all) of
    ``batch`` rows, beams included. It is the ``replaced`` layer, unless that would store too little. ``tag`` identifies
    the decision.
    """

    def __init__(
        self, inner: DynamicLayer, rows: Tensor | None, batch: int, tag: Any, replaced: DynamicLayer | None = None
    ) -> None:
        self.inner = inner
        self.replaced = replaced or inner
        self.rows = rows
        self.batch = batch
        self.tag = tag
        self.is_open = False  # whether the decision of ``tag`` is in force; otherwise reading and writing are refused
        self.length = 0  # positions so far, dropped tokens included

    # Properties, since Hugging Face only reads keys and values; ``update`` writes them.
    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys of the kept rows."""
        self._check_open()
        return self.inner.keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values of the kept rows."""
        self._check_open()
        return self.inner.values

    @property
    def is_initialized(self) -> bool:
        """Whether the model has run on any position."""
        return self.length > 0

    @property
    def is_sliding(self) -> bool:
        """Whether only a sliding window is stored."""
        return self.inner.is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the inner layer is initialised by its first update."""

    def get_max_length(self) -> int:
        """The inner layer's maximum."""
        return self.inner.get_max_length()

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of the kept rows; raises ``ValueError`` under another decision."""
        self._check_open()
        return self.inner.update(keys, values, *args, **kwargs)

    def advance(self, positions: int) -> None:
        """Count positions that the model has run on, even if no row ran this layer."""
        self.length += positions

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``query_length`` positions may attend to."""
        window = getattr(self.inner, "sliding_window", None)
        if window is None:
            return self.length + query_length, 0
        return min(self.length, window - 1) + query_length, max(self.length - window + 1, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows as the beams: all beams of an input share its decision, so kept rows replace kept rows."""
        if self.rows is None:
            self._take(beam_idx)
        elif len(self.rows):
            place = torch.zeros(self.batch, dtype=torch.long, device=self.rows.device)
            place[self.rows] = torch.arange(len(self.rows), device=self.rows.device)
            self._take(place[beam_idx.to(self.rows.device)[self.rows]])

    def reset(self) -> None:
        """Empty the cache: this becomes the layer that it replaced, which any decision, or none, may fill.

        A layer does not know its cache, so it cannot put another one in its place.
        """
        replaced, own = self.replaced, vars(self)
        replaced.reset()
        own.clear()
        own.update(vars(replaced))
        self.__class__ = type(replaced)  # pyright: ignore[reportAttributeAccessIssue]

    def offload(self) -> None:
        """Move the kept rows to the CPU."""
        self.inner.offload()

    def prefetch(self) -> None:
        """Move the kept rows back to the device."""
        self.inner.prefetch()

    def crop(self, *_: Any) -> None:
        """Raise ``NotImplementedError``: assisted decoding, which crops, works only without decisions."""
        raise NotImplementedError(
            "a cache that was filled under skip decisions cannot be cropped, as assisted decoding does; leave it out, "
            "or use a model of a bank of masks"
        )

    def batch_select_indices(self, *_: Any) -> None:
        """Raise ``NotImplementedError``: row i of the decision would no longer be row i of the cache."""
        raise NotImplementedError(
            "the rows of a cache that was filled under skip decisions cannot be selected or repeated; run the prompts "
            "of the new batch under its own decisions"
        )

    batch_repeat_interleave = batch_select_indices

    def refuse(self) -> None:
        """Raise ``ValueError``: the decision in force is not that of ``tag``."""
        raise ValueError(
            f"this cache was filled under a decision for {self.batch} rows, which is not in force; go on under the "
            "decision that filled it, or start with an empty cache"
        )

    def _check_open(self) -> None:
        if not self.is_open:
            self.refuse()

    def _take(self, rows: Tensor) -> None:
        if self.inner.keys is not None and self.inner.values is not None:
            rows = rows.to(self.inner.keys.device)
            self.inner.keys = self.inner.keys.index_select(0, rows)
            self.inner.values = self.inner.values.index_select(0, rows)


def row_subset_layer(
    cache: Cache, layer: int, *, across: bool, rows: Tensor | None, batch: int, whole: bool, tag: Any
) -> RowSubsetLayer:
    """The layer of a cache that holds only ``rows``; it is put into the cache at its first use.

    ``across``: whether it is of the cross-attention; ``whole``: whether a sliding window must store all positions, as
    tokens were dropped (the mask still limits it). Raises ``ValueError`` if it was filled under another decision than
    that of ``tag``, ``NotImplementedError`` if it is not dynamic.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if across else cache.self_attention_cache
    while len(cache.layers) <= layer:  # as Cache.update does
        assert cache.layer_class_to_replicate is not None  # otherwise all layers exist from the start
        cache.layers.append(cache.layer_class_to_replicate())
    inner = cache.layers[layer]
    if isinstance(inner, RowSubsetLayer):
        if inner.tag != tag:
            inner.refuse()
        return inner
    if not isinstance(inner, DynamicLayer) or type(inner) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise NotImplementedError(
            f"decisions work with dynamic caches, not with {type(inner).__name__}; leave cache_implementation as it is"
        )
    if inner.is_initialized:
        raise ValueError("this cache was filled outside the decision in force; start with an empty cache")
    cache.layers[layer] = subset = RowSubsetLayer(DynamicLayer() if whole else inner, rows, batch, tag, inner)
    return subset


def cache_among(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a module's arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


class LayerKeys(NamedTuple):
    """What a layer of a cache holds of prompts: ``keys`` and ``values``, each ``[kept, heads, positions, size]``.

    ``rows``: the rows of the batch that they are of, beams included, int64 ``[kept]``, ascending; ``None``: all.
    ``repeats``: rows of the batch for each input.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None
    repeats: int = 1

    def of(self, inputs: Tensor, positions: int) -> "LayerKeys":
        """A copy of those of some inputs, int64 ``[n]``, at so many positions: zeros where a sliding window has passed.

        Raises ``ValueError`` if the layer does not hold them, as an input has skipped its attention.
        """
        place = inputs * self.repeats
        if self.rows is not None:
            rows = self.rows.to(place.device).contiguous()
            if not torch.isin(place, rows).all():
                raise ValueError("keys of an input that skipped an attention are missing; resume inputs that ran all")
            place = torch.searchsorted(rows, place)

        def taken(held: Tensor) -> Tensor:
            held = held.to(place.device) if held.device.type == "cpu" else held  # an offloaded cache
            return F.pad(held.index_select(0, place.to(held.device)), (0, 0, positions - held.shape[2], 0))

        return LayerKeys(taken(self.keys), taken(self.values))


def held_keys(cache: Cache | None, layers: int, repeats: int) -> tuple[LayerKeys, ...] | None:
    """What the first ``layers`` layers of a decoder-only model's cache hold, not copied.

    ``repeats``: rows of the batch for each input. ``None`` without such a cache, or if a layer holds nothing.
    """
    if cache is None or isinstance(cache, EncoderDecoderCache):
        return None
    held = []
    for layer in cache.layers[:layers]:
        rows, inner = (layer.rows, layer.inner) if isinstance(layer, RowSubsetLayer) else (None, layer)
        if not isinstance(inner, DynamicLayer) or inner.keys is None or inner.values is None:
            return None
        held.append(LayerKeys(inner.keys, inner.values, rows, repeats))
    return tuple(held)


def joined_keys(parts: Sequence[tuple[LayerKeys, ...]]) -> tuple[LayerKeys, ...]:
    """Those of all inputs of several batches, at equally many positions."""
    return tuple(
        LayerKeys(torch.cat([own.keys for own in layer]), torch.cat([own.values for own in layer]))
        for layer in zip(*parts, strict=True)
    )


def fill_layers(cache: Cache, held: Sequence[LayerKeys], inputs: Tensor, positions: int) -> None:
    """Fill the first layers of an empty cache with what they held of prompts of so many positions.

    ``inputs``: the prompt of each row of the batch, int64 ``[rows]``. The cache's own layers are put back first.
    """
    restore_layers(cache)
    for number, layer in enumerate(held):
        keys, values, *_ = layer.of(inputs, positions)
        cache.update(keys, values, number)


def restore_layers(cache: Cache) -> None:
    """Put a cache's own layers back; used where the decision turns out to skip nothing."""
    double = isinstance(cache, EncoderDecoderCache)
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if double else (cache,):
        part.layers[:] = [layer.inner if isinstance(layer, RowSubsetLayer) else layer for layer in part.layers]
