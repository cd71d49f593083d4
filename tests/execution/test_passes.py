"""Decisions share the passes that they have in common."""

import gymnasium as gym
import numpy as np
import pytest

from tests.envs.conftest import SMALL


@pytest.mark.parametrize("num_beams", [1, 2])
def test_masks_that_agree_on_the_encoder_share_its_pass_where_texts_are_generated(num_beams):
    settings = {"quality": "metric", "metric": "rouge", "num_beams": num_beams, "token_shares": [0.0, 0.2]}
    core = gym.make("SD/Summarization-Mini-v0", **SMALL, **settings).unwrapped.core
    split, rows = core.split("test"), np.arange(8)
    masks = np.zeros((5, len(core.nvec)), dtype=np.int64)
    masks[1:3, -3] = masks[2, -2] = 1  # these three differ in the last decoder layer alone
    masks[3:, -1] = masks[4, 2] = 1  # these two drop tokens, and differ in the encoder
    encoder = []
    core.backbone.model.base_model.encoder.layers[0].fc1.register_forward_hook(lambda *_: encoder.append(1))
    texts = split.passes.generated_under_all(rows, masks)
    assert len(encoder) == 3
    assert texts == [split.passes.generated(rows, np.tile(mask, (8, 1))) for mask in masks]
    found = split.scoring.under_all(rows, masks)
    alone = [split.scoring.quality_and_likelihood(rows, np.tile(mask, (8, 1))) for mask in masks]
    for values, expected in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(values, np.stack(expected, axis=1), rtol=1e-5)
