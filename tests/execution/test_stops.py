"""Texts end at a stop, whichever tokens complete it."""

import pytest
import torch

from sd_gym.execution.stops import Stop, cut_at_stop
from tests.backbones.heads.test_prompted import joining_tokenizer


@pytest.mark.parametrize("stop", ["\n", ".\n", "Label:", " good", " "])
@pytest.mark.parametrize("kind", ["sentencepiece", "merging"])
def test_a_text_ends_with_the_token_that_completes_its_stop(kind, stop):
    tokenizer = joining_tokenizer(kind)
    texts = ["a bad film.\nLabel: good.\n", "a good film", "a film", "good film\n\nLabel:"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    prompt = torch.full((4, 2), tokens[0, 0].item())
    criterion, whole = Stop(stop, tokenizer, 2), tokenizer.batch_decode(tokens, skip_special_tokens=True)
    expected = []
    for row in tokens:
        parts = [tokenizer.decode(row[:length], skip_special_tokens=True) for length in range(1, len(row) + 1)]
        expected.append(next((length for length, text in enumerate(parts, 1) if stop in text), None))
    first = [None] * 4
    for length in range(1, tokens.shape[1] + 1):
        for row in criterion(torch.cat([prompt, tokens[:, :length]], dim=1), None).nonzero()[:, 0].tolist():
            first[row] = first[row] or length
    assert first == expected
    lengths, ended = torch.full((4,), 99), torch.zeros(4, dtype=torch.bool)
    assert [criterion.length(row) for row in tokens.tolist()] == expected
    cut_at_stop(stop, tokenizer, tokens, lengths, ended)
    assert lengths.tolist() == [length or 99 for length in expected]
    assert ended.tolist() == [stop in text for text in whole]


@pytest.mark.parametrize("stop", ["</s>", "</s>\n"])
def test_a_stop_may_have_special_tokens(stop):
    tokenizer = joining_tokenizer("merging")
    tokens = tokenizer("a good film</s>\n a film").input_ids
    criterion = Stop(stop, tokenizer)
    assert tokenizer.decode(tokens[: criterion.length(tokens)]) == f"a good film{stop}"
    assert criterion.length(tokens[:2]) is None
