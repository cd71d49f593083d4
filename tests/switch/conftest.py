"""Models and decisions that several tests of switching share."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache

from tests.conftest import DECODER, ENCODER_DECODER, TINY, row_of

KINDS = ["bert", "mbart", "llama"]
GENERATING = ENCODER_DECODER + DECODER


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def mixed(board, batch, seed=0):
    """Decisions by which every row skips something, and no two rows the same."""
    skip = np.random.default_rng(seed).random((batch, len(board))) < 0.5
    skip[:, 0] = np.arange(batch) % 2
    return skip


def logits(board, skip, inputs, keep=None):
    with torch.inference_mode(), board.decide(skip, keep):
        return board.model(**inputs).logits


def each_row_is_as_alone(board, skip, inputs, model=None):
    """Whether a batch of mixed decisions is each row alone, and differs from the dense one."""
    model = model or board.model
    counted = inputs["attention_mask"].bool() if model.config.model_type in DECODER else None
    with torch.inference_mode():
        dense = model(**inputs).logits
        with board.decide(skip):
            together = model(**inputs).logits
        assert together.isfinite().all()
        assert not torch.equal(together, dense)
        for row in range(len(skip)):
            with board.decide(skip[row : row + 1]):
                alone = model(**row_of(inputs, row)).logits[0]
            rows = slice(None) if counted is None else counted[row]
            torch.testing.assert_close(together[row][rows], alone[rows], rtol=1e-4, atol=1e-4)


def fresh_cache(name):
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if name in ENCODER_DECODER else DynamicCache()


def quantised(model, inplace=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=inplace)


def random_decisions(board, batch, length, seed, rate=0.5):
    """A skip matrix, and a keep matrix that leaves the first and the last token in place."""
    random = np.random.default_rng(seed)
    keep = random.random((batch, length)) < 0.7
    keep[:, [0, -1]] = True
    return random.random((batch, len(board))) < rate, keep


class Synchronisations(TorchDispatchMode):
    """Counts what waits for the device where it is not the host itself."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in self.WAITING
        return function(*args, **(kwargs or {}))
