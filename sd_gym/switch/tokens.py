"""Physically dropping tokens of the input, before the first layer of an unmodified Hugging Face model.

The kept tokens are gathered after the embedding, so they keep their positions; masks and rotary embeddings follow. The
model's output has the full length, with zeros at dropped tokens. Only between encoder and decoder the states stay
short, which makes the cross-attention cheaper.
"""

import inspect
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sd_gym.switch.cache import cache_among, hidden_states


def keep_tokens(scores: NDArray, droppable: NDArray, share: NDArray | float) -> NDArray:
    """The tokens that are kept when each row drops a share of its droppable tokens, lowest scores first.

    Args:
        scores: Importance of each token, ``[n, length]``; of two equal tokens the later one is dropped.
        droppable: Whether a token may be dropped, bool ``[n, length]``; false at special tokens, padding and questions.
        share: Share of the droppable tokens to drop, in ``[0, 1)``, for all rows or ``[n]``; rounded down.

    Returns:
        Whether each token is kept, bool ``[n, length]``.

    Raises:
        ValueError: If a share is outside ``[0, 1)`` or the shapes differ.

    Example:
        >>> keep_tokens(np.array([[9.0, 1.0, 3.0, 2.0]]), np.array([[False, True, True, True]]), 0.7)
        array([[ True, False,  True, False]])
    """
    if scores.shape != droppable.shape:
        raise ValueError(f"scores {scores.shape} and droppable {droppable.shape} must have the same shape")
    share = np.broadcast_to(np.asarray(share, dtype=float), len(scores))
    if not ((share >= 0) & (share < 1)).all():
        raise ValueError(f"a share of tokens to drop must be in [0, 1), got {share.min()} to {share.max()}")
    dropped = dropped_tokens(droppable, share)
    ranked = np.argsort(np.where(droppable, scores, np.inf)[:, ::-1], axis=1, kind="stable")
    rank = np.empty_like(ranked)
    np.put_along_axis(rank, ranked, np.arange(scores.shape[1])[None], axis=1)
    return rank[:, ::-1] >= dropped[:, None]


def dropped_tokens(droppable: NDArray, share: NDArray | float) -> NDArray:
    """How many tokens ``keep_tokens`` drops, int64 ``[n]``.

    Example:
        >>> dropped_tokens(np.array([[False, True, True, True]]), 0.7)
        array([2])
    """
    return np.floor(share * droppable.sum(axis=1) + 1e-9).astype(np.int64)  # 0.3 of 10 is 3 despite rounding


def position_scores(shape: Sequence[int]) -> NDArray:
    """Earlier tokens matter more: float64 ``[n, length]``.

    Example:
        >>> position_scores((1, 3))
        array([[ 0., -1., -2.]])
    """
    return np.broadcast_to(np.arange(0, -shape[1], -1, dtype=float), tuple(shape))


def inverse_document_frequency(corpus: Iterable[NDArray]) -> NDArray:
    """Inverse document frequency of each token: ``log((1 + N) / (1 + df))`` (Sparck Jones 1972).

    Args:
        corpus: Token ids of each document, int ``[length]``.

    Returns:
        float64 ``[largest id + 2]``, by token id; the last value is for all tokens that are in no document.

    Example:
        >>> corpus = [np.array([0, 1]), np.array([0]), np.array([0, 2])]
        >>> inverse_document_frequency(corpus).round(2)
        array([0.  , 0.69, 0.69, 1.39])
    """
    documents = [np.unique(document) for document in corpus]
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *documents]).astype(np.int64)
    frequency = np.bincount(ids, minlength=int(ids.max(initial=-1)) + 2)
    return np.log((1 + len(documents)) / (1 + frequency))


def rarity_scores(input_ids: NDArray, present: NDArray, rarity: NDArray) -> NDArray:
    """Rare tokens matter more: float64 ``[n, length]``, ``-inf`` at padding.

    Args:
        input_ids: ``[n, length]``.
        present: bool ``[n, length]``, False at padding.
        rarity: From ``inverse_document_frequency``.

    Example:
        >>> rarity_scores(np.array([[0, 1, 9]]), np.array([[True, True, False]]), np.array([0.0, 0.69, 1.39]))
        array([[0.  , 0.69, -inf]])
    """
    return np.where(present, rarity[np.minimum(input_ids, len(rarity) - 1)], -np.inf)


class DroppedTokens:
    """The tokens that a batch keeps: ``keep``, bool ``[batch, length]``; a single row stands for all rows.

    ``causal``: whether positions attend only to earlier positions.
    """

    def __init__(self, keep: NDArray, causal: bool, device: torch.device) -> None:
        counts = keep.sum(axis=1)
        self.batch, self.length = keep.shape
        self.kept = int(counts.max())  # largest number of tokens that a row keeps
        self.causal = causal
        self.tag = keep.tobytes()  # identifies the kept tokens
        # After its kept tokens, each row has some of its dropped tokens as padding, which is never attended to.
        order = np.argsort(~keep, axis=1, kind="stable")[:, : self.kept]
        self._pair = (
            torch.from_numpy(order).to(device),
            torch.from_numpy(np.arange(self.kept) < counts[:, None]).to(device),
        )
        self.is_ragged = bool(counts.min() < self.kept)  # whether the rows keep different numbers of tokens
        self._views = {(1, device): self._pair}

    def view(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and validity ``[total, kept]``, on the device of ``hidden [total, ...]``, where rows are repeated."""
        key = len(hidden) // self.batch, hidden.device
        if key not in self._views:
            index, valid = (values.to(key[1]).repeat_interleave(key[0], dim=0) for values in self._pair)
            self._views[key] = index, valid
        return self._views[key]

    def mark(self, encoded: Tensor) -> None:
        """Mark an encoder's output with the tokens that it was computed from."""
        if not torch.compiler.is_compiling():  # there the decoder, in the same trace, reads what the encoder gave
            vars(encoded)["_kept_tokens"] = self.tag

    def check(self, encoded: Tensor) -> None:
        """Raise ``ValueError`` if an encoder's output lacks the mark of these tokens."""
        if not torch.compiler.is_compiling() and getattr(encoded, "_kept_tokens", None) != self.tag:
            raise ValueError(
                f"the encoder's output, of {encoded.shape[1]} tokens, was made under another decision than the one in "
                f"force, which keeps up to {self.kept}, was copied, or comes from an encoder that was compiled alone; "
                "run the encoder under the same keep as the decoder, and pass its output on as it is"
            )

    def before_decoder(self, kwargs: dict[str, Any], *, generating: bool) -> dict[str, Any]:
        """Arguments of a decoder, with the mask of the encoder's shorter output."""
        encoded = kwargs.get("encoder_hidden_states")
        if encoded is None:
            return kwargs
        if not generating:  # generate() repeats the output for its beams, which has no mark then
            self.check(encoded)
        index, valid = self.view(encoded)
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            mask = mask.to(index.device).gather(1, index) * valid
        elif self.is_ragged:
            mask = valid.long()
        return {**kwargs, "encoder_attention_mask": mask}


class TokenPass:
    """One forward pass that drops tokens; it reads the shapes from the first layer's ``args`` and ``kwargs``.

    ``additive``: whether the attention adds its mask to the scores; ``causal``: as of ``DroppedTokens``, in this pass;
    ``has_prompt``: whether ``generate()`` has read the prompt, so that generated tokens may follow. Raises
    ``ValueError`` if the input has another length than ``tokens``.
    """

    def __init__(
        self,
        tokens: DroppedTokens,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        additive: bool,
        causal: bool,
        has_prompt: bool,
    ) -> None:
        hidden = hidden_states(args, kwargs)
        self.query_length = hidden.shape[1]  # positions of the pass, dropped ones included
        self._tokens = tokens
        self._additive = additive
        self._causal = causal
        cache = cache_among(args, kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        self._whole = not past  # otherwise the cache holds the input, and the pass a step or another turn
        before = past or self.query_length
        if not (before >= tokens.length if past or has_prompt else before == tokens.length):
            raise ValueError(
                f"tokens are dropped from inputs of {tokens.length} tokens, but the model got {self.query_length}"
                + (f" after {past} in its cache" if past else "")
                + "; keep needs one column per token of the padded input (1 at padding and at an answer after a prompt)"
            )
        self._keys = past + self.query_length
        self._index_of_keys, self._valid_keys = self._extended(hidden, self._keys)
        self._memo: list[tuple[Tensor, Tensor]] = []
        # Without padding, models omit the mask; rows that keep different numbers of tokens need one.
        self._own_mask = None
        if tokens.is_ragged:
            self._own_mask = self._make_mask(self._index_of_keys, self._valid_keys, hidden.dtype)

    def gather_square(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Rows and columns of kept tokens of ``[1 or total, heads, query, query]``: ``[total, heads, kept, kept]``."""
        index = self._extended(hidden, self.query_length)[0]
        compact = _take(_take(values.expand(len(hidden), -1, -1, -1), index, -1), index, -2)
        self._memo.append((compact, compact))  # later layers get it unchanged
        return compact

    def before_layer(
        self, layer: nn.Module, first: bool, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Arguments of a layer, without the dropped tokens."""
        if self._own_mask is not None:
            slot = _mask_slot(type(layer))
            if slot >= len(args):
                if kwargs.get("attention_mask") is None:
                    kwargs = {**kwargs, "attention_mask": self._own_mask}
            elif args[slot] is None:
                args = (*args[:slot], self._own_mask, *args[slot + 1 :])
        # The hidden states are the first argument, or named. After the first layer they hold kept tokens only.
        done = 0 if first else 1
        args = (*args[:done], *map(self._compact, args[done:]))
        return args, {
            name: value if name == "hidden_states" and not first else self._compact(value)
            for name, value in kwargs.items()
        }

    def after_last_layer(self, output: Any) -> Any:
        """The output with zeros at the dropped positions."""
        if not self._whole:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        index, valid = (of_keys.to(hidden.device)[:, :, None] for of_keys in (self._index_of_keys, self._valid_keys))
        kept = hidden.masked_fill(~valid, 0) if self._tokens.is_ragged else hidden
        full = hidden.new_zeros(len(hidden), self.query_length, hidden.shape[-1]).scatter(
            1, index.expand_as(hidden), kept
        )
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _extended(self, hidden: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Indices and validity of the kept ones among ``positions``; generated tokens are always kept."""
        index, valid = self._tokens.view(hidden)
        if positions == self._tokens.length:
            return index, valid
        new = torch.arange(self._tokens.length, positions, device=index.device).expand(len(hidden), -1)
        return torch.cat([index, new], dim=1), torch.cat([valid, torch.ones_like(new, dtype=torch.bool)], dim=1)

    def _make_mask(self, index: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        allowed = valid[:, None, None, :]
        if self._causal and self._whole:
            allowed = allowed & (index[:, None, None, :] <= index[:, None, :, None])
        if not self._additive:
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def _compact(self, value: Any) -> Any:
        """A layer's argument without the dropped tokens, if it has a dimension of tokens."""
        if isinstance(value, tuple):
            return tuple(map(self._compact, value))
        if not isinstance(value, Tensor) or value is self._own_mask:
            return value
        if value.ndim == 4 and value.shape[-1] == self._keys:
            return self._mask(value)
        if self._whole and value.ndim in (2, 3) and value.shape[1] == self.query_length:
            index = self._index_of_keys
            return _take(value.expand(len(index), *value.shape[1:]), index, 1)
        return value

    def _mask(self, mask: Tensor) -> Tensor:
        for known, compact in self._memo:  # the same few masks go to every layer
            if known is mask:
                return compact
        index = self._index_of_keys
        compact = _take(mask.expand(len(index), -1, -1, -1), index, -1)
        if self._whole and mask.shape[-2] == self.query_length > 1:
            compact = _take(compact, index, -2)
        if self._tokens.is_ragged:
            valid = self._valid_keys[:, None, None, :]
            lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            compact = compact.masked_fill(~valid, lowest)
        self._memo.append((mask, compact))
        return compact


@lru_cache
def _mask_slot(layer_class: type[nn.Module]) -> int:
    """Index of the attention mask among a layer's positional arguments."""
    return list(inspect.signature(layer_class.forward).parameters).index("attention_mask") - 1


def _take(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Elements of ``values [total, ...]`` along ``dim``, by each row's indices ``index [total, kept]``."""
    shape, expanded = [1] * values.ndim, list(values.shape)
    shape[0], shape[dim] = index.shape
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(expanded))
