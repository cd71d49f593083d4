"""Passes in which a policy decides stage by stage: rows that go on wait for those of other passes."""

from collections import Counter
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sd_gym
from sd_gym.going_on import answer_masks
from sd_gym.inference import rollout, staged_passes
from sd_gym.inference.rollout import StagedRollout
from sd_gym.inference.staged_passes import PASS_TOKENS, StagedPasses
from sd_gym.policy import DecisionPolicy
from sd_gym.switch import PassState
from sd_gym.switch.cache import LayerKeys
from tests.envs.conftest import trained
from tests.serving.test_engine import few_masks

STAGES = {
    "classification": ["first", "encoder.1", "answer"],
    "last token": ["decoder.1", "answer"],
    "extracted": ["first", "encoder.1", "answer"],
    "summarization": ["first", "decoder", "answer"],
    "prompted": ["first", "answer"],
}


def plain(answers):
    return [(one.answer, one.skip.tolist(), one.went_on, one.flops_ratio) for one in answers]


@pytest.mark.parametrize("task", STAGES)
def test_a_row_that_waited_is_answered_as_if_it_were_alone(task, tmp_path, tiny_tokenizer, monkeypatch):
    *_, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer, stages=STAGES[task])
    model = sd_gym.load(artefact)
    alone = [plain(model([text]))[0] for text in texts]
    assert 0 < sum(went_on for *_, went_on, _ in alone) < len(texts)
    assert plain(model(texts)) == alone
    assert plain(model(texts, batch_size=4)) == alone
    monkeypatch.setattr(staged_passes, "PASS_TOKENS", 0)  # no state is held longer than its pass
    assert plain(model(texts, batch_size=4)) == alone


def test_rows_that_go_on_from_a_layer_run_in_as_few_passes_as_they_may(tmp_path, tiny_tokenizer):
    core, _, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer, stages=STAGES["classification"])
    split, every = core.split("test"), np.arange(24)
    passes, board, resumed = StagedPasses(split, artefact), core.backbone.board, Counter()
    passes.most, decide = 3, board.decide

    def counted(skip, keep=None, *, resume_from=None):
        if len(skip) == 1:  # not to judge an early exit
            resumed[None if resume_from is None else resume_from.stage] += 1
        return decide(skip, keep, resume_from=resume_from)

    board.decide = counted
    passes.answers(every, passes.masks)
    del board.decide
    again = passes.went_on
    layer = (passes.masks[:, :-1] != 0).argmax(axis=1) // 2  # of two switches
    rows = Counter(f"encoder.{one}" if one else None for one in layer[again])
    assert sum(rows.values()) > 6
    assert resumed == {stage: ceil(count / 3) for stage, count in rows.items()}


@pytest.mark.parametrize("held", [PASS_TOKENS, 0])
@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_of_several_passes_are_gone_on_with_together(beams, held, tmp_path, tiny_tokenizer, monkeypatch):
    core, _, artefact, _ = trained("prompted", "position", tmp_path, tiny_tokenizer, stages=("first", "answer"))
    monkeypatch.setattr(staged_passes, "PASS_TOKENS", held)
    split, every, random = core.split("test"), np.arange(24), np.random.default_rng(0)
    masks = np.zeros((24, 7), dtype=np.int64)
    masks[every, every % 6] = 1  # four rows begin to skip at each switch
    masks[:, :-1] |= (random.random((24, 6)) < 0.5) & (np.arange(6) > every[:, None] % 6)
    masks[20:, -1] = 1
    artefact.network.decide = lambda shown: np.ones((len(shown), 8), dtype=np.int64)
    passes, ran = StagedPasses(split, artefact, known=True), []
    passes.most, passes._num_beams, split.passes._num_beams = 3, beams, beams
    dense = split.passes.answers(every, 0 * masks)
    decide = core.backbone.board.decide

    def decided(skip, keep=None, *, resume_from=None):
        ran.append((resume_from.stage, len(resume_from.hidden)) if resume_from is not None else ("first", 0))
        return decide(skip, keep, resume_from=resume_from)

    core.backbone.board.decide = decided
    assert passes.answers(every, masks) == dense
    del core.backbone.board.decide
    assert passes.went_on.all()
    rows = {stage: sum(count for name, count in ran if name == stage) for stage in ("decoder.1", "decoder.2")}
    assert rows == {"decoder.1": 6, "decoder.2": 6}  # of eight each, those that drop nothing
    assert (max(count for _, count in ran) == 3) or not held


@pytest.mark.parametrize("task", ["classification", "prompted"])
def test_rows_of_a_mask_run_together_if_it_is_known_before_the_first_layer(task, tmp_path, tiny_tokenizer, monkeypatch):
    *_, artefact, texts = trained(task, None, tmp_path, tiny_tokenizer, stages=("first", "answer"))
    model, ran = sd_gym.load(few_masks(artefact)), []
    choose = StagedRollout._choose

    def chosen(own, state):
        skip, keep = choose(own, state)
        ran.append({one.tobytes() for one in own.decisions})
        return skip, keep

    monkeypatch.setattr(StagedRollout, "_choose", chosen)
    masks = {one.skip.tobytes() for one in model(texts * 4, batch_size=4)}
    assert len(masks) > 1
    assert sum(len(of_pass) > 1 for of_pass in ran) < len(masks)  # only where one mask ends and the next one begins
    assert len(ran) >= len(texts)


def test_a_text_is_observed_once_and_its_mask_decided_once(tmp_path, tiny_tokenizer, monkeypatch):
    *_, artefact, texts = trained("classification", None, tmp_path, tiny_tokenizer, stages=("first", "answer"))
    model, observed, decided = sd_gym.load(few_masks(artefact)), [], []
    inner, decide = rollout.pooled_features, DecisionPolicy.decide
    monkeypatch.setattr(rollout, "pooled_features", lambda *given: observed.append(1) or inner(*given))
    monkeypatch.setattr(DecisionPolicy, "decide", lambda *given: decided.append(len(given[1])) or decide(*given))
    model(texts[:1])
    assert (len(observed), sum(decided)) == (1, 2)  # the mask, and whether to accept its answer
    decided.clear()
    model(texts)
    assert sum(decided) == 2 * len(texts)
    observed.clear()
    split = model.split([[text] for text in texts])
    model.decided_at([model.policy, model.policy.with_margin(1.0)], split)
    assert len(observed) == 1


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4), st.booleans(), st.data())
@settings(max_examples=50, deadline=None)
def test_states_of_several_passes_are_joined_row_by_row(lengths, left, data):
    states, rows, side = [], [], "left" if left else "right"
    for own in lengths:
        mask = torch.arange(max(own)) < torch.tensor(own)[:, None]
        mask = mask.flip(1) if left else mask
        hidden = torch.where(mask[..., None], torch.rand(*mask.shape, 2) + 1, 0)
        keys = LayerKeys(hidden[:, None], -hidden[:, None])
        states.append(PassState("encoder.1", hidden, mask.long(), encoded=hidden, keys=(keys, keys)))
        rows += [one[present] for one, present in zip(hidden, mask, strict=True)]
    picked = np.array(data.draw(st.permutations(range(len(rows)))))[: data.draw(st.integers(1, len(rows)))]
    longest = max(len(rows[row]) for row in picked)
    joined = staged_passes._joined(states, picked, longest, side)
    assert joined.hidden.shape == (len(picked), longest, 2)
    assert torch.equal(joined.encoded, joined.hidden)
    for layer in joined.keys:
        assert torch.equal(layer.keys[:, 0], joined.hidden)
        assert torch.equal(layer.values[:, 0], -joined.hidden)
    assert joined.size == 5 * joined.mask.numel()  # two layers hold keys and values as wide as the hidden states
    for row, hidden, mask in zip(picked, joined.hidden, joined.mask.bool(), strict=True):
        assert torch.equal(hidden[mask], rows[row])
        assert not hidden[~mask].any()


def test_nothing_is_extracted_from_tokens_that_were_dropped(tmp_path, tiny_tokenizer):
    core, policy, artefact, _ = trained(
        "extracted", "position", tmp_path, tiny_tokenizer, stages=["first", "encoder.1", "answer"]
    )
    split, every = core.split("test"), np.arange(24)
    decisions = core.rollout(split, every, policy.decide)[0]
    assert decisions[:, -2].any()
    passes = StagedPasses(split, artefact)
    parts = [(picked, logits) for picked, logits, _ in passes.logits(every, passes.masks)]
    came = {row: one for picked, logits in parts for row, one in zip(picked, logits, strict=True)}
    ((picked, logits, _),) = split.passes.logits(every, answer_masks(decisions, len(core.mask_nvec)))
    for row, wanted in zip(picked, logits, strict=True):
        length = split.encoded.source_length[row]
        torch.testing.assert_close(came[row][..., :length], wanted[..., :length], rtol=1e-3, atol=1e-3)
