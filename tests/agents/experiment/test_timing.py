"""What is timed: never the clock itself."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from sd_gym.agents.experiment import timing
from sd_gym.agents.experiment.export import export
from sd_gym.agents.experiment.timing import time_ratio
from torch.utils.flop_counter import FlopCounterMode

import sd_gym.execution.split
import sd_gym.policy.features
import sd_gym.switch
from sd_gym.inference import rollout
from sd_gym.inference.attach import attach, detach
from sd_gym.tasks import ranking
from tests.envs.conftest import looking
from tests.execution.conftest import SMALL, Drawn
from tests.inference.conftest import make_policy
from tests.switch.conftest import Synchronisations


def noting(module, name, monkeypatch):
    """The sizes of the batches that a module's function is called with from now on."""
    sizes, inner = [], getattr(module, name)

    def noted(board, inputs):
        sizes.append(len(inputs["input_ids"]))
        return inner(board, inputs)

    monkeypatch.setattr(module, name, noted)
    return sizes


@pytest.mark.parametrize("settings", [{}, {"observation": "tokens"}])
def test_deciding_is_timed_from_the_tokenised_inputs_on(settings, monkeypatch):
    """What the split knows already is not used: each batch is observed and ranked anew."""
    core = gym.make("SD/Summarization-Mini-v0", **SMALL, **settings, token_ranking="attention").unwrapped.core
    split = core.split("test")
    split.features, split.tokens.scores  # noqa: B018  (known)
    decided = []
    looked = [noting(module, "first_layer_input", monkeypatch) for module in (sd_gym.policy.features, sd_gym.switch)]
    ranked = noting(ranking, "attention_received", monkeypatch)

    class Policy(Drawn):
        def decide(self, observations):
            if isinstance(observations, dict):
                observations = observations["tokens"]
            decided.append(len(observations))
            return super().decide(observations)

    time_ratio(core, Policy(core), "test", 8, batches=3)
    rounds, queue = 5, min(timing.TIMED_ROWS, len(split))
    assert sum(ranked) == queue * rounds
    assert sum(looked[0] + looked[1]) == queue * (2 * rounds if settings else rounds)  # the split never keeps tokens
    assert set(decided) == {queue}


def test_the_clock_waits_for_the_device_before_and_after_a_run():
    core = gym.make("SD/Classification-Mini-v0", **SMALL).unwrapped.core
    during = []
    with Synchronisations() as waits:
        timing._seconds(lambda: during.append(waits.count), core.backbone)
    assert (during, waits.count) == ([1], 2)


def test_a_queue_runs_in_passes_of_at_most_the_batch_size(monkeypatch):
    core = gym.make("SD/Classification-Mini-v0", **SMALL).unwrapped.core
    logits, sizes = type(core.backbone).logits, []

    def noted(backbone, inputs):
        sizes.append(len(inputs["input_ids"]))
        return logits(backbone, inputs)

    monkeypatch.setattr(type(core.backbone), "logits", noted)
    time_ratio(core, Drawn(core), "test", 8, batches=3)
    queue, queues = min(timing.TIMED_ROWS, len(core.split("test"))), timing.WARM_UP + timing.LEAST_TIMED
    assert max(sizes) == 8 < queue
    assert sum(sizes) == 4 * queue * queues  # dense, with the policy, dense by length and on shorter texts


def test_controls_stand_beside_each_time():
    core = gym.make("SD/Summarization-Mini-v0", **SMALL).unwrapped.core
    timed = time_ratio(core, Drawn(core), "test", 8, batches=3)
    assert set(timed) == {"time_ratio", "dense_by_length", "dense_shortened"}
    core = gym.make("SD/Summarization-Mini-v0", **{**SMALL, "token_shares": [0.0]}).unwrapped.core
    assert time_ratio(core, Drawn(core), "test", 1, batches=3)["dense_shortened"] is None


def test_dense_is_timed_densely_whatever_is_attached(monkeypatch):
    """FLOPs in the place of seconds: they are those of a model to which nothing is attached."""

    def counted(run, backbone, inner=timing._seconds):
        with FlopCounterMode(display=False) as counter:
            inner(run, backbone)
        return counter.get_total_flops()

    monkeypatch.setattr(timing, "_seconds", counted)
    core = gym.make("SD/Classification-Mini-v0", **SMALL).unwrapped.core
    model = core.backbone.model
    model.set_attn_implementation("eager")
    wanted = time_ratio(core, Drawn(core), "test", 8, batches=3)
    attach(model, make_policy(copy.deepcopy(model), seed=3))
    try:
        assert time_ratio(core, Drawn(core), "test", 8, batches=3) == wanted
    finally:
        detach(model)
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("ranking", ["idf", "attention"])
@torch.inference_mode()
def test_a_row_that_is_decided_on_in_its_pass_is_embedded_once(ranking):
    core = gym.make("SD/QuestionAnswering-Mini-v0", **SMALL, token_ranking=ranking).unwrapped.core
    split, policy, embedded = core.split("test"), Drawn(core), []
    model = core.backbone.model
    hooks = [model.get_encoder().embed_tokens.register_forward_hook(lambda *_: embedded.append(1))]
    try:
        for row in range(10):
            rows = np.array([row])
            embedded.clear()
            ((picked, logits, labels),) = core.decided_logits(split.uncached(rows), np.array([0]), policy.decide)
            times = len(embedded)
            ((_, expected, same),) = split.passes.logits(rows, policy.decide(core.observe(split, rows)))
            assert times == (1 if ranking == "idf" else 3)  # to rank by attention takes another look
            np.testing.assert_allclose(policy.seen[-2], policy.seen[-1], rtol=1e-4, atol=1e-4)
            assert torch.equal(logits, expected)
            assert torch.equal(labels, same)
            assert picked.tolist() == [0]
    finally:
        hooks[0].remove()


def test_a_policy_that_looks_at_answers_is_timed_going_on(settings):
    """What is timed runs one pass, and of the rows that go on the rest again; or it writes their texts again."""
    small = {**SMALL, "token_shares": [0.0]}
    for env_id, keys in (("SD/Summarization-Mini-v0", small), ("SD/Classification-Custom-v0", settings)):
        core = gym.make(env_id, **keys, stages=["first", "answer"]).unwrapped.core
        policy, split = looking(core), core.split("test")
        rows = np.arange(min(12, len(split)))
        decisions, _ = core.rollout(split, rows, policy.decide)
        assert 0 < decisions[:, -1].sum() < len(rows)
        parts = [picked for picked, _ in split.passes.planned(rows, 0 * core.to_masks(decisions))]
        executed = split.costs.executed_flops(rows, decisions, parts) + len(rows) * policy.flops
        model = core.backbone.model
        artefact = export(core, policy, (), {})
        run = timing._Queue(core, policy, artefact, split, rows, len(rows)).runs()[1]["time_ratio"]
        model.set_attn_implementation("eager")
        try:
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                run()
        finally:
            model.set_attn_implementation("sdpa")
        assert counter.get_total_flops() == pytest.approx(
            executed, rel=0.3 * (keys is small)
        )  # texts have lengths of their own
    for size in (2, None):
        timed = time_ratio(core, policy, "test", size, batches=1)
        assert timed["time_ratio"] > 0
    assert timed["dense_by_length"] is None  # in bulk, dense is by length anyway


def test_a_policy_with_stages_is_timed_in_passes_of_the_batch_size(settings):
    core, sizes = gym.make("SD/Classification-Custom-v0", **settings, stages=["first", "encoder.1"]).unwrapped.core, []
    hook = core.backbone.model.base_model.embeddings.register_forward_hook(lambda *given: sizes.append(len(given[2])))
    try:
        for size in (2, 1):
            sizes.clear()
            time_ratio(core, looking(core), "test", size, batches=1)
            assert set(sizes) == {size}
    finally:
        hook.remove()


def test_a_single_text_that_is_timed_is_observed_once(settings, monkeypatch):
    core = gym.make("SD/Classification-Custom-v0", **settings, stages=["first", "answer"]).unwrapped.core
    observed, inner = [], rollout.pooled_features
    monkeypatch.setattr(rollout, "pooled_features", lambda *given: observed.append(1) or inner(*given))
    policy = looking(core)
    run = timing._Queue(core, policy, export(core, policy, (), {}), core.split("test"), np.arange(1), 1).runs()[1]
    with torch.inference_mode():
        run["time_ratio"]()
    assert len(observed) == 1
