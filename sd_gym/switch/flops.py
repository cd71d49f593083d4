"""Analytic FLOPs of a switched backbone, vectorised over instances and decisions.

They are counted like ``torch.utils.flop_counter.FlopCounterMode``: 2 per multiply-add of every matrix product, in
linear layers, in the two products of an attention, and in the heads. Embeddings, norms and activations count 0.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from sd_gym.switch.architectures import Switch
from sd_gym.switch.switchboard import Switchboard


class FlopsModel:
    """FLOPs of one backbone as a function of lengths and decisions.

    ``costs`` returns ``(always, switched)``, int64: the FLOPs of each instance that no decision saves ``[n]``, and
    those of each switch ``[n, switches]``. A decision costs ``always + (switched * (1 - skip)).sum(axis=1)``.

    Args:
        board: The switchboard of the backbone; dimensions are read from its modules.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from sd_gym.switch import Switchboard
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> board = Switchboard(BertForSequenceClassification(config))
        >>> always, switched = FlopsModel(board).costs(np.array([5, 10]))  # two inputs of 5 and 10 tokens
        >>> switched  # attention and feed-forward of each
        array([[11840, 10240],
               [26880, 20480]])
        >>> skip = np.array([[0, 1], [1, 1]])
        >>> always + (switched * (1 - skip)).sum(axis=1)
        array([12416,   576])
    """

    def __init__(self, board: Switchboard) -> None:
        stacks = board.architecture.stacks
        self._encoder_decoder = len(stacks) > 1
        self._decodes = self._encoder_decoder or board.architecture.causal
        token_heads, sequence_heads = board.architecture.token_heads, board.architecture.sequence_heads
        if "ForTokenClassification" in type(board.model).__name__:
            token_heads, sequence_heads = (*token_heads, *sequence_heads), ()
        self._token_head, self._sequence_head = (_head(board.model, paths) for paths in (token_heads, sequence_heads))
        coefficients = np.array([_coefficients(switch) for switch in board.switches], dtype=np.int64)
        self._per_query, self._per_source, self._per_pair = coefficients.T
        self._on_target = np.array([not switch.reads_input for switch in board.switches])
        self._across = np.array([switch.sublayer.kind == "cross_attention" for switch in board.switches])

    def costs(
        self,
        source_length: NDArray,
        target_length: NDArray | None = None,
        kept_length: NDArray | None = None,
        *,
        beams: int = 1,
    ) -> tuple[NDArray, NDArray]:
        """FLOPs of one forward pass, teacher-forced where the backbone generates.

        Args:
            source_length: Tokens of the input, int ``[n]``; for a decoder-only model, prompt and answer together.
            target_length: Tokens that an encoder-decoder's decoder runs on, int ``[n]``. For a decoder-only model, the
                tokens that the head runs on (``logits_to_keep``); ``None``: all.
            kept_length: Tokens of the input that are not dropped, int ``[n]``; ``None``: all.
            beams: How many texts are generated at once for each input. Only an encoder runs once for all of them.

        Raises:
            ValueError: If the backbone is an encoder-decoder and ``target_length`` is missing.
        """
        if target_length is None and self._encoder_decoder:
            raise ValueError("an encoder-decoder backbone needs target_length as well as source_length")
        source = np.asarray(source_length, dtype=np.int64)[:, None]
        kept = source if kept_length is None else np.asarray(kept_length, dtype=np.int64)[:, None]
        target = source if target_length is None else np.asarray(target_length, dtype=np.int64)[:, None]
        query = np.where(self._on_target, target, kept)
        pairs = query * np.where(self._across, kept, query)
        # Dropped positions are returned as zeros, so the head of an encoder or single decoder runs on all positions.
        always = beams * self._token_head * (target if self._decodes else source)[:, 0] + self._sequence_head
        switched = self._per_query * query + self._per_source * kept + self._per_pair * pairs
        return always, switched * np.where(self._on_target | (not self._encoder_decoder), beams, 1)

    def first_attention(self, length: NDArray) -> NDArray:
        """FLOPs of the first layer's attention on inputs of ``length [n]``, int64 ``[n]``: to rank tokens."""
        return self.costs(length, length)[1][:, 0]


def _coefficients(switch: Switch) -> tuple[int, int, int]:
    """FLOPs per query token, per encoder token, and per pair of query and key."""
    source = sum(_products(switch.layer.get_submodule(path)) for path in switch.sublayer.source)
    query = sum(map(_products, switch.modules)) - source
    output = switch.sublayer.output
    projection = None if output is None else switch.layer.get_submodule(output)
    heads = _shape(getattr(projection, "base_layer", projection))[0]
    return 2 * query, 2 * source, 2 * 2 * heads  # per pair: the score and the weighted sum


def _shape(module: Any) -> tuple[int, int]:
    """Input and output width of a linear layer, quantised or adapted too; (0, 0) for any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else (0, 0)


def _products(module: nn.Module) -> int:
    """Multiply-adds per token of all linear layers in a module; in an adapted one (PEFT), of its parts."""
    if not hasattr(module, "base_layer") and (own := prod(_shape(module))):
        return own
    # Beside the copy that runs, PEFT keeps the original of a module that is trained whole.
    return sum(_products(part) for name, part in module.named_children() if name != "original_module")


def _head(model: nn.Module, paths: tuple[str, ...]) -> int:
    modules = dict(model.named_modules())
    return 2 * sum(_products(modules[path]) for path in paths if path in modules)
