"""Batches of observations, flat and by name."""

import numpy as np
import torch

from sd_gym.policy.observations import blinded, select_rows, to_tensors

FLAT = np.array([[1, 0, 3.5], [0, 1, -2.0]])


def test_the_same_happens_to_each_part():
    named = {"stage": FLAT, "tokens": np.ones((2, 4, 5))}
    assert select_rows(FLAT, np.array([1, 1])).tolist() == [[0, 1, -2.0]] * 2
    tensors = to_tensors(select_rows(named, np.array([1])))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} == {
        "stage": (torch.float32, (1, 3)),
        "tokens": (torch.float32, (1, 4, 5)),
    }


def test_who_is_blind_sees_the_stage_alone_where_there_are_several():
    assert blinded(FLAT, ["first", "decoder"]).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert not blinded(FLAT, ["first"]).any()
    named = blinded({"stage": FLAT, "tokens": np.ones((2, 4, 5))}, ["first", "decoder"])
    assert named["stage"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert not named["tokens"].any()
