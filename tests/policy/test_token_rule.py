"""Which tokens may be dropped, told from the tokens alone."""

import numpy as np
import torch

from sd_gym.policy.token_rule import TokenRule


def test_a_rule_for_protected_tokens_is_taken_only_if_it_says_just_the_same():
    ids = torch.tensor([[1, 7, 8, 2, 9, 9, 2], [1, 7, 2, 9, 2, 0, 0]])
    length = np.array([7, 5])
    question = np.array([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    rule = TokenRule.find(ids, length, question, [0, 1, 2], 2)
    assert rule.separator == 2
    first = np.array([[0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    assert TokenRule.find(ids, length, first, [0, 1, 2], 2) == TokenRule((0, 1, 2), 2, 1, None)
    assert TokenRule.find(ids, length, first[::-1].copy(), [0, 1, 2], 2) is None
