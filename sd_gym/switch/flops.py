"""Analytic FLOPs of a switched forward pass, vectorised over instances and decisions.

Counted as ``torch.utils.flop_counter.FlopCounterMode`` counts: 2 per multiply-add of every matrix product, that is
the linears, the two products of an attention, and the heads. Embedding look-ups, norms and activations count nothing.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from sd_gym.switch.switchboard import Switch, Switchboard


class FlopsModel:
    """FLOPs of one backbone as a function of lengths and decisions.

    Args:
        board: The switchboard of the backbone; dimensions are read from its modules.
    """

    def __init__(self, board: Switchboard) -> None:
        self._encoder_decoder = any(stack.name == "decoder" for stack in board.architecture.stacks)
        self._token_head = _head(board.model, board.architecture.token_heads)
        self._sequence_head = _head(board.model, board.architecture.sequence_heads)
        costs = np.array([_coefficients(switch) for switch in board.switches], dtype=np.int64)
        self._per_query, self._per_source, self._per_pair = costs.T
        self._on_target = np.array([switch.stack == "decoder" for switch in board.switches])
        self._across = np.array([switch.sublayer.kind == "cross_attention" for switch in board.switches])

    def costs(
        self, source_length: np.ndarray, target_length: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs of each part, for instances of the given lengths.

        Args:
            source_length: Tokens of the input, int ``[n]``.
            target_length: Tokens that the decoder runs on (teacher forcing), int ``[n]``; not used by encoders.

        Returns:
            ``(always, switched)``, int64: FLOPs that no decision saves ``[n]``, and of each switch ``[n, switches]``.

        Raises:
            ValueError: If the backbone has a decoder and ``target_length`` is missing.
        """
        source = np.asarray(source_length, dtype=np.int64)[:, None]
        if not self._encoder_decoder:
            target = source
        elif target_length is None:
            raise ValueError("an encoder-decoder backbone needs target_length as well as source_length")
        else:
            target = np.asarray(target_length, dtype=np.int64)[:, None]
        query = np.where(self._on_target, target, source)
        key = np.where(self._across, source, query)
        switched = self._per_query * query + self._per_source * source + self._per_pair * query * key
        always = self._token_head * target[:, 0] + self._sequence_head
        return always, switched


def _coefficients(switch: Switch) -> tuple[int, int, int]:
    """FLOPs per query token, per encoder token, and per pair of query and key."""
    modules = switch.modules
    source = sum(_multiply_adds(modules[0].get_submodule(path)) for path in switch.sublayer.source)
    query = sum(_multiply_adds(part) for module in modules for part in module.modules()) - source
    pair = 0
    if switch.sublayer.query is not None:
        pair = 2 * modules[0].get_submodule(switch.sublayer.query).out_features  # the scores and the weighted sum
    return 2 * query, 2 * source, 2 * pair


def _multiply_adds(module: nn.Module) -> int:
    """Multiply-adds a token of one linear; 0 for any other module, whose linears are counted one by one."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _head(model: nn.Module, paths: tuple[str, ...]) -> int:
    modules = dict(model.named_modules())
    return 2 * sum(_multiply_adds(modules[path]) for path in paths if path in modules)
