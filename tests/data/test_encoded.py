"""Batches that are cut out of a split."""

import numpy as np
import pytest
import torch

from sd_gym.data.encoded import Encoded


@pytest.fixture
def encoded():
    """Three inputs of 2, 4 and 1 tokens; the second was cut."""
    ids = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 4], [3, 0, 0, 0]])
    cut = np.array([False, True, False])
    targets = {"labels": torch.tensor([0, 1, 0]), "target_length": np.ones(3, int), "target_cut": ~cut}
    return Encoded(input_ids=ids, source_length=np.array([2, 4, 1]), source_cut=cut, **targets)


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [("right", [[3, 0], [5, 6]], [[1, 0], [1, 1]]), ("left", [[0, 3], [5, 6]], [[0, 1], [1, 1]])],
)
def test_a_batch_is_as_long_as_its_longest_input(encoded, side, ids, mask):
    inputs = encoded.inputs(np.array([2, 0]), torch.device("cpu"), padding_side=side)
    assert {key: value.tolist() for key, value in inputs.items()} == {"input_ids": ids, "attention_mask": mask}


def test_a_part_has_its_rows_of_everything(encoded):
    part = encoded.part(np.array([1, 1]))
    assert part.source_length.tolist() == [4, 4]
    assert part.labels.tolist() == [1, 1]
    assert part.token_type_ids is None
    assert part.counts == {"instances": 2, "cut_inputs": 2, "cut_targets": 0}
    assert encoded.counts == {"instances": 3, "cut_inputs": 1, "cut_targets": 2}
