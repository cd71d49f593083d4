"""The stage after the head has answered: accept, or go on densely."""

import json
from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from safetensors.numpy import load_file, save_file
from sd_gym.agents.experiment.replay import replay
from sd_gym.agents.learning.decisions import DENSE_MARGIN, versions
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.envs.actions import read_masks
from sd_gym.policy import DecisionPolicy
from tests.envs.conftest import PROMPT, SMALL, core_of, trained

TABLE = "SD/Table-v0"
STAGES = [["first", "answer"], ["first", "encoder.1", "answer"]]


@pytest.fixture(scope="module", params=STAGES, ids=["one look", "two looks"])
def source(request, table_source):
    keys = {**table_source[1], "token_shares": [0.0, 0.5], "stages": request.param}
    return table_source[0], keys


@pytest.fixture(scope="module")
def core(source):
    return core_of(source[0], **source[1])


@pytest.fixture(scope="module")
def table(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("answers") / "table"
    sd_gym.tabulate(source[0], folder, decisions="random:4", seed=1, **source[1])
    return str(folder)


def drawn(core, n, seed=0):
    return np.random.default_rng(seed).integers(core.nvec, size=(n, len(core.nvec)))


def test_going_on_gives_the_dense_answer_at_the_cost_of_both(core):
    split = core.split("validation")
    rows = np.arange(len(split))
    decisions = drawn(core, len(rows))
    masks, goes_on = core.to_masks(decisions), decisions[:, -1] == 1
    came, accepted = core.score(split, rows, decisions), core.score(split, rows, core.from_masks(masks))
    np.testing.assert_array_equal(came.quality, np.where(goes_on, came.quality_ref, accepted.quality))
    rest = split.costs.going_on(rows, masks) / split.costs.dense_flops(rows)
    np.testing.assert_allclose(came.flops_ratio, accepted.flops_ratio + goes_on * rest)
    assert (came.flops_ratio <= core.highest_flops_ratio).all()
    dense = np.zeros_like(decisions)
    dense[:, -1] = 1
    assert (core.score(split, rows, dense).flops_ratio == 1).all()  # nothing is left to run


def test_the_stage_shows_what_the_head_says_of_its_answer(core):
    split, looks = core.split("validation"), core.stage_observer
    rows, last = np.arange(len(split)), len(core.stages) - 1
    decisions = drawn(core, len(rows))
    seen, _ = looks.observe(split, rows, last, decisions, None)
    before, _ = looks.observe(split, rows, last - 1, decisions, None)
    said = len(core.backbone.head.judgement)
    assert seen.shape[1] == core.observation_space.shape[0]
    assert not before[:, -said:].any()
    assert (seen[:, last] == 1).all()
    masks = core.to_masks(decisions)
    np.testing.assert_allclose(seen[:, last + 1], split.costs.reading_ratio(rows, masks), atol=1e-6)
    np.testing.assert_allclose(seen[:, last + 2 : -said], before[:, last + 2 : -said], atol=1e-4)
    confidence = split.passes.confidence(rows, masks)
    np.testing.assert_allclose(seen[:, -said], np.log(confidence / (1 - confidence)).clip(-10, 10), atol=1e-3)
    changed = decisions.copy()
    changed[:, -1] = 1 - changed[:, -1]
    np.testing.assert_array_equal(looks.observe(split, rows, last, changed, None)[0], seen)


def test_episodes_end_at_the_answer(source):
    env = gym.make(source[0], **source[1]).unwrapped
    core = env.core
    _, info = env.reset(seed=0)
    for stage in range(len(core.stages)):
        mask = info["action_mask"].astype(bool)
        np.testing.assert_array_equal(mask, core.action_masks[stage])
        action = np.ones(env.action_space.shape, dtype=np.int64)
        _, reward, over, _, info = env.step(np.minimum(action, env.action_space.nvec - 1))
        assert over == (stage == len(core.stages) - 1)
        assert info["goes_on"] == over
    assert info["quality"] == info["quality_ref"]
    assert reward == pytest.approx(1 - info["flops_ratio"])
    assert reward < 0  # all was skipped, and all was run


def test_it_passes_the_checkers(source, table):
    for env_id, keys in ((source[0], source[1]), (TABLE, {"table": table})):
        check_env(gym.make(env_id, **keys).unwrapped, skip_render_check=True)
        check_sb3_env(gym.make(env_id, **keys).unwrapped)


def test_a_table_has_the_same_looks_and_outcomes(core, table):
    ours = core_of(TABLE, table=table)
    assert ours.stages == core.stages
    for name in ("train", "validation", "test"):
        mine, theirs = ours.split(name), core.split(name)
        rows = np.arange(len(theirs))
        for ways in product(*map(range, ours.nvec)):
            decided = np.tile(ways, (len(rows), 1))
            decisions = core.from_masks(ours.to_masks(decided))
            decisions[:, -1] = ways[-1]
            came, expected = ours.score(mine, rows, decided), core.score(theirs, rows, decisions)
            np.testing.assert_array_equal(came.quality, expected.quality)
            np.testing.assert_allclose(came.flops_ratio, expected.flops_ratio, rtol=1e-12)
            np.testing.assert_array_equal(mine.costs.flops(rows, decided), theirs.costs.flops(rows, decisions))
            if ways[-1]:
                continue
            for stage in range(len(ours.stages)):
                seen, _ = ours.stage_observer.observe(mine, rows, stage, decided, None)
                shown, _ = core.stage_observer.observe(theirs, rows, stage, decisions, None)
                np.testing.assert_allclose(seen, shown, atol=1e-3)
        np.testing.assert_array_equal(ours.from_masks(ours.to_masks(decided)), decided * [*[1] * (len(ways) - 1), 0])


def test_a_table_of_prompts_counts_what_runs_again_on_texts(tmp_path, tiny_tokenizer):
    core, *_ = trained("prompted", "position", tmp_path, tiny_tokenizer, stages=("first", "answer"))
    keys = {"dataset": str(tmp_path / "data"), "backbone": str(tmp_path / "backbone"), "prompt": PROMPT, "splits": {}}
    keys |= {"max_target_length": 4, "max_source_length": 26, "overlap": "allow", "token_shares": [0.0, 0.4]}
    keys |= {"token_ranking": "position", "stages": ["first", "answer"]}
    masks = np.concatenate([np.zeros((1, 7), dtype=int), np.eye(7, dtype=int), np.ones((1, 7), dtype=int)])
    (tmp_path / "masks.json").write_text(json.dumps(masks.tolist()))
    env_id, folder = "SD/QuestionAnswering-Custom-v0", tmp_path / "table"
    sd_gym.tabulate(env_id, folder, decisions=f"codebook:{tmp_path}/masks.json", **keys)

    def of_masks():
        ours, theirs = core_of(TABLE, table=str(folder)).split("test").costs, core.split("test").costs
        table = read_masks(folder / "codebook.json", core.mask_nvec)
        for number, mask in enumerate(table):
            yield (
                ours.going_on(rows, np.tile([number, 1], (24, 1))),
                theirs.going_on(rows, np.tile(mask, (24, 1))),
                mask,
            )

    rows = np.arange(24)
    for came, expected, _ in of_masks():
        np.testing.assert_array_equal(came, expected)
    for file in folder.glob("*.safetensors"):  # as it was made when a prompt was read again from the start
        tensors = load_file(file)
        assert (tensors.pop("read", None) is not None) == (file.stem in ("train", "validation", "test"))
        save_file(tensors, file)
    described = json.loads((folder / "table.json").read_text())
    assert described.pop("resume_points") == [0, 2, 4]
    (folder / "table.json").write_text(json.dumps({**described, "resume_points": [0]}))
    dense = core.split("test").costs.dense_flops(rows)
    for came, _, mask in of_masks():
        np.testing.assert_array_equal(came, dense * mask.any())


@pytest.mark.parametrize("source", STAGES[1:], indirect=True, ids=["two looks"])
@pytest.mark.parametrize("algo", ["ppo", "a2c", "ppo_lagrangian", "ppo_lex", "reinforce", "imitation", "static"])
def test_agents_learn_there_and_their_runs_are_played_again(algo, table, tmp_path):
    steps = {} if algo in ("imitation", "static") else {"num_envs": 16}
    settings = {"epochs": 3} if algo == "imitation" else steps
    result = sd_gym.train(TABLE, algo, tmp_path / "run", steps=64, table=table, epsilon=0.3, **settings)
    assert 0 <= result["goes_on"] <= 1
    assert replay(tmp_path / "run").has_policy


def test_more_margin_goes_on_more_and_skips_less(core):
    policy = DecisionPolicy(
        core.observation_space.shape[0], core.nvec.tolist(), core.switch_names, stages=core.stages
    ).eval()
    split = core.split("validation")
    rows = np.arange(len(split))
    skips, on = [], []
    for margin in (-20.0, 0.0, 20.0):
        decisions, _ = core.rollout(split, rows, policy.with_margin(margin).decide)
        skips.append(decisions[:, :-1].mean())
        on.append(decisions[:, -1].mean())
    assert skips == sorted(skips, reverse=True)
    assert (on[0], on[-1], skips[-1]) == (0, 1, 0)
    assert core.score(split, rows, decisions).flops_ratio.max() == 1
    assert not core.goes_on(decisions).any()  # nothing was skipped


def test_a_margin_raises_the_threshold_of_answers_and_keeps_the_masks(core):
    policy = DecisionPolicy(
        core.observation_space.shape[0], core.nvec.tolist(), core.switch_names, stages=core.stages
    ).eval()
    *masks, _ = np.cumsum([0, *core.nvec[:-1]]) + np.arange(len(core.nvec)) % core.nvec
    policy.head.bias.data[torch.tensor(masks)] += 5.0  # preferred by more than margins of answers change
    split = core.split("validation")
    rows = np.arange(len(split))
    points = versions(core, policy)
    decided = np.stack([core.rollout(split, rows, point.policy.decide)[0] for point in points])
    assert (decided[..., :-1] == decided[0, :, :-1]).all()
    shares = decided[..., -1].mean(axis=1).tolist()
    assert shares == sorted(shares, reverse=True)
    assert len({*shares}) > 3
    assert not core.rollout(split, rows, policy.with_margin(DENSE_MARGIN).decide)[0][:, :-1].any()


def test_versions_of_a_blind_policy_differ_in_what_they_skip(core):
    policy = DecisionPolicy(
        core.observation_space.shape[0], core.nvec.tolist(), core.switch_names, blind=True, stages=core.stages
    ).eval()
    torch.nn.init.normal_(policy.head.bias)
    rows = np.arange(4)
    found = [core.rollout(core.split("validation"), rows, point.policy.decide)[0] for point in versions(core, policy)]
    assert len(np.unique([decisions[:, :-1].mean() for decisions in found])) > 2


def test_a_policy_that_skips_nothing_goes_on_nowhere(table, tmp_path):
    result = sd_gym.train(TABLE, "imitation", tmp_path / "run", table=table, epsilon=1e-6, epochs=1)
    assert (result["flops_ratio"], result["goes_on"]) == (1, 0)
    assert replay(tmp_path / "run").has_policy


def test_a_text_is_judged_by_the_tokens_that_were_generated():
    core = core_of("SD/Classification-Mini-v0", stages=["first", "answer"], **SMALL)
    split, rows = core.split("test"), np.arange(8)
    masks = np.zeros((8, len(core.mask_nvec)), dtype=np.int64)
    masks[4:, 6:18] = 1
    texts, judged = split.passes.answers_and_judgement(rows, masks)
    assert texts == split.passes.answers(rows, masks)
    assert judged.shape == (8, len(core.backbone.head.judgement))
    assert (judged[:, 1] <= judged[:, 0] + 1e-9).all()  # the least probable token is no more probable than the mean
    alone = [split.passes.answers_and_judgement(rows[[row]], masks[[row]])[1][0] for row in range(8)]
    np.testing.assert_allclose(judged, alone, atol=1e-2)


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        (["answer"], {}, "nothing is decided before the stage answer"),
        (["answer", "first"], {}, "nothing is decided before the stage answer"),
        (["first", "answer"], {"action": "multi_binary"}, "decided with action multi_discrete"),
        (["encoder.3"], {"action": "multi_binary"}, "decided with action multi_discrete"),  # has no bit of token levels
    ],
)
def test_what_cannot_be_is_refused(stages, keys, message):
    with pytest.raises(ConfigError, match=message):
        gym.make("SD/Classification-Mini-v0", stages=stages, **keys, **SMALL)


def test_a_picture_shows_the_dense_answer_where_the_pass_goes_on():
    env = gym.make("SD/Classification-Mini-v0", stages=["first", "answer"], render_mode="ansi", **SMALL)
    split, said = env.unwrapped.core.split("train"), []
    for goes_on in (0, 1):
        _, info = env.reset(seed=0)
        env.step(env.action_space.nvec - 1)  # skips all
        env.step(np.eye(1, len(env.action_space.nvec), dtype=np.int64)[0] * goes_on)
        said.append(env.render())
    row = np.array([split.row_of[info["instance"]]])
    (dense,) = split.passes.answers(row, np.zeros((1, len(env.action_space.nvec)), dtype=np.int64))
    assert dense in said[1]
    assert said[0] != said[1]
