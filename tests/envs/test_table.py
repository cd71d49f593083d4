"""Tables: the env that looks up is the env that computes; what is exactly known of one; what is damaged is told."""

import json
import shutil
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from sd_gym.agents.experiment.replay import ReplayError, replay
from sklearn.decomposition import PCA

import sd_gym
from sd_gym.envs import Outcome
from sd_gym.policy import DecisionPolicy
from tests.envs.conftest import SMALL, assert_same, contents_of, core_of, edited

ID = "SD/Table-v0"
SPLITS = ("train", "validation", "test")


def same_outcomes(looked_up, computed):
    """Every split, mask and instance: quality, FLOPs and what is known of the instance, exactly."""
    for name in SPLITS:
        ours, theirs = looked_up.split(name), computed.split(name)
        rows = np.arange(len(theirs))
        np.testing.assert_array_equal(looked_up.observe(ours, rows), computed.observe(theirs, rows))
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.difficulty, theirs.difficulty)
        np.testing.assert_array_equal(ours.levels, theirs.levels)
        assert_same(ours.facts(), {key: np.asarray(values) for key, values in theirs.facts().items()})
        assert ours.provenance == json.loads(json.dumps(theirs.provenance))
        for number, mask in enumerate(looked_up.masks):
            decision = mask if looked_up.exhaustive else [number]
            came = looked_up.score(ours, rows, np.tile(decision, (len(rows), 1)))
            expected = computed.score(theirs, rows, np.tile(mask, (len(rows), 1)))
            for key in Outcome.__dataclass_fields__:
                np.testing.assert_array_equal(
                    getattr(came, key), getattr(expected, key), err_msg=f"{name} {key} {mask}"
                )


def test_a_table_is_the_env_that_it_is_of(table, table_source):
    looked_up, computed = core_of(ID, table=table), core_of(table_source[0], **table_source[1])
    assert looked_up.backbone.board.names == computed.backbone.board.names
    assert looked_up.backbone.weights == computed.backbone.weights
    assert all(looked_up.data[name].identity == computed.data[name].identity for name in SPLITS)
    same_outcomes(looked_up, computed)
    if looked_up.exhaustive:
        np.testing.assert_array_equal(looked_up.masks, list(product(*map(range, computed.nvec))))


@pytest.mark.parametrize("env_id", ["SD/Classification-Mini-v0", "SD/QuestionAnswering-Mini-v0"])
def test_a_table_of_an_encoder_and_a_decoder(env_id, tmp_path):
    """Quality of logits, through the tree of passes; difficulties, and facts in words."""
    sizes = dict.fromkeys(SMALL, 6)
    sd_gym.tabulate(env_id, tmp_path, decisions=["random:6", "codebook"], instances=6, token_shares=[0.0, 0.3])
    same_outcomes(core_of(ID, table=str(tmp_path)), core_of(env_id, token_shares=[0.0, 0.3], **sizes))


def test_a_table_of_generated_texts(tmp_path):
    """Whose quality is graded: as it is, not rounded."""
    keys = {"quality": "metric", "metric": "rouge", **dict.fromkeys(SMALL, 4)}
    sd_gym.tabulate("SD/Summarization-Mini-v0", tmp_path, decisions="random:4", **keys)
    same_outcomes(core_of(ID, table=str(tmp_path)), core_of("SD/Summarization-Mini-v0", **keys))


# --- small enough to be passed on -----------------------------------------------------------------------------------


def test_reduced_observations_are_principal_components_of_the_training_split(shared_table, table_source):
    """Of unit variance there, without correlation, and of the whole variance as much as scikit-learn says."""
    core = core_of(ID, table=shared_table)
    assert core.observation_space == gym.spaces.Box(-10, 10, (3,), np.float32)
    split = core.split("train")
    reduced = core.observe(split, np.arange(len(split))).astype(np.float64)
    assert (np.abs(reduced) < 10).all()  # none was clipped
    np.testing.assert_allclose(np.cov(reduced.T), np.eye(3), atol=2e-3)
    np.testing.assert_allclose(reduced.mean(axis=0), 0, atol=1e-3)
    source = core_of(table_source[0], **table_source[1])
    whole = source.observe(source.split("train"), np.arange(len(split)))
    expected = PCA(3, svd_solver="full").fit(whole.astype(np.float64)).explained_variance_ratio_
    np.testing.assert_allclose(core.observation.projection.explained, expected, rtol=1e-5)


@pytest.mark.parametrize("name", SPLITS)
def test_what_the_env_observes_is_reduced_to_what_the_table_has(name, shared_table, table_source):
    """Exactly, one by one or together; so a policy of the table decides on inputs of the env."""
    ours, theirs = core_of(ID, table=shared_table), core_of(table_source[0], **table_source[1])
    reduce, split = ours.observation.projection, ours.split(name)
    rows = np.arange(len(split))
    seen = theirs.observe(theirs.split(name), rows)
    np.testing.assert_array_equal(reduce(seen), ours.observe(split, rows))
    np.testing.assert_array_equal(np.concatenate([reduce(one[None]) for one in seen]), ours.observe(split, rows))


def test_reducing_is_part_of_what_a_policy_costs(shared_table, tmp_path):
    """Not of one that does not look."""
    split = core_of(ID, table=shared_table).split("test")
    rows, projection = np.arange(len(split)), core_of(ID, table=shared_table).observation.projection
    assert projection.flops == 2 * 3 * len(projection.mean)
    for algo, looks in (("ppo", True), ("blind-ppo", False)):
        result = sd_gym.train(ID, algo, tmp_path / algo, steps=128, table=shared_table)
        own = DecisionPolicy.load(tmp_path / algo).flops + looks * projection.flops
        added = result["flops_ratio_with_policy"] - result["flops_ratio"]
        assert added == pytest.approx((own / split.costs.dense_flops(rows)).mean())


def test_nothing_else_is_passed_on(shared_table, table_source):
    """Outcomes are those of the env; ids are numbers, and no file holds a text, a path, or an id of the data."""
    ours, theirs = core_of(ID, table=shared_table), core_of(table_source[0], **table_source[1])
    for name in SPLITS:
        split, source = ours.split(name), theirs.split(name)
        rows = np.arange(len(split))
        assert list(split.ids) == [f"{name}-{row}" for row in rows]
        for number, mask in enumerate(ours.masks):
            came = ours.score(split, rows, np.full((len(rows), 1), number))
            expected = theirs.score(source, rows, np.tile(mask, (len(rows), 1)))
            np.testing.assert_array_equal(came.quality, expected.quality)
            np.testing.assert_array_equal(came.flops_ratio, expected.flops_ratio)
        facts = {key: values for key, values in source.facts().items() if values.dtype.kind in "biuf"}
        assert_same(split.facts(), {key: np.asarray(values) for key, values in facts.items()})
    assert ours.data["test"].identity["hash"] == theirs.data["test"].identity["hash"]
    assert ours.description["chosen"] == "random:6 and codebook:masks.json, seed 0"
    assert ours.config.data.dataset == "reviews.jsonl"
    written = b"".join(contents_of(shared_table).values())
    secret = [table_source[1]["dataset"], table_source[1]["backbone"]]
    secret += [one.source for name in SPLITS for one in theirs.split(name).instances]
    assert not [one for one in secret if one.encode() in written]


def test_a_run_on_a_table_is_played_again(table, tmp_path):
    """Its decisions are recorded as masks, also where an action is the number of one."""
    sd_gym.train(ID, "hash", tmp_path / "run", steps=1, table=table)
    assert replay(tmp_path / "run").has_policy
    file = tmp_path / "run" / "instances.csv"
    lines = file.read_text().splitlines()
    other = next(one for one in ("1" * 7, "0" * 7) if f",{one}," not in lines[1])
    was = next(cell for cell in lines[1].split(",") if len(cell) == 7 and set(cell) <= {"0", "1"})
    file.write_text("\n".join([lines[0], lines[1].replace(was, other), *lines[2:]]) + "\n")
    with pytest.raises(ReplayError, match="decisions were changed"):
        replay(tmp_path / "run")


# --- what is wrong with one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "'table' has no value; pass the folder of one"),
        ({"backbone": "mini"}, "the table .* was made with .*, got 'mini'; only split, stages, reward.objective"),
        ({"epsilom": 1}, "did you mean 'reward.epsilon'"),
        ({"table": 5}, "expected the folder of a table"),
        ({"epsilon": -1}, "config key 'reward.epsilon'"),
        ({"objective": "riskily"}, "unknown objective 'riskily'"),
    ],
)
def test_what_a_table_cannot_be_asked_for(keys, words, full_table):
    table = {"table": full_table} if keys else {}
    with pytest.raises(ValueError, match=words):
        gym.make(ID, disable_env_checker=True, **{**table, **keys})
    with pytest.raises(ValueError, match=f"takes no table; for a folder with a table, use {ID}"):
        gym.make("SD/Classification-Mini-v0", disable_env_checker=True, table=full_table)


def test_a_table_lists_no_texts(full_table):
    with pytest.raises(ValueError, match="a table has no texts"):
        sd_gym.instances(ID, table=full_table)


# --- agents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ppo", "ppo_lex", "reinforce", "imitation", "static", "oracle", "dense", "random"])
def test_agents_learn_on_a_table(algo, table, tmp_path):
    """Selection and evaluation included; the run can be evaluated again."""
    result = sd_gym.train(ID, algo, tmp_path, steps=256, table=table)
    assert 0 <= result["flops_ratio"] <= 1.5
    assert result["time"] == {}
    if algo != "oracle":
        again = sd_gym.evaluate(ID, tmp_path)
        assert again["quality"] == result["quality"]
        assert again["flops_ratio"] == result["flops_ratio"]


def test_agents_that_look_at_the_backbone_say_so(full_table, small_table, tmp_path):
    for algo, table, words in (
        ("early-exit", full_table, "neither tables nor this env have one"),
        ("every-other", small_table, "this table has only some masks"),
    ):
        with pytest.raises(ValueError, match=words):
            sd_gym.train(ID, algo, tmp_path / algo, table=table)


def test_a_policy_of_a_full_table_decides_on_the_env(full_table, table_source, tmp_path):
    sd_gym.train(ID, "ppo", tmp_path, steps=256, table=full_table)
    looked_up = sd_gym.evaluate(ID, tmp_path)
    env_id, keys = table_source
    computed = sd_gym.evaluate(env_id, tmp_path, **keys)
    for key in ("quality", "quality_ref", "flops_ratio", "skip_rate", "by_difficulty"):
        assert computed[key] == looked_up[key]


def test_a_run_is_evaluated_on_another_table(full_table, small_table, table_source, tmp_path):
    """If it decides on the same, and sees as much."""
    sd_gym.train(ID, "dense", tmp_path / "run", table=full_table)
    with pytest.raises(ValueError, match="decides on components"):
        sd_gym.evaluate(ID, tmp_path / "run", table=small_table)
    sd_gym.tabulate(table_source[0], tmp_path / "few", instances=3, **table_source[1])
    assert sd_gym.evaluate(ID, tmp_path / "run", "train", table=str(tmp_path / "few"))["instances"] == 3
    full = Path(shutil.copytree(full_table, tmp_path / "copy"))
    sd_gym.train(ID, "dense", tmp_path / "other", table=str(full))
    edited(full, backbone={**json.loads((full / "table.json").read_text())["backbone"], "weights": "0" * 64})
    with pytest.raises(ValueError, match="has other weights than in training"):
        sd_gym.evaluate(ID, tmp_path / "other")
