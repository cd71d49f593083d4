"""Tables of envs that decide at several stages: what is looked up is what the env would have shown and scored."""

import json
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from sd_gym.agents.experiment.tabulation import combine_stages, random_masks
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.files import map_arrays
from tests.envs.conftest import SMALL, assert_same, called, contents_of, core_of

ID = "SD/Table-v0"
SPLITS = ("train", "validation", "test")

STAGES = {"stages": ["first", "encoder.1", "encoder.2"]}


@pytest.fixture(scope="module")
def source(table_source):
    return table_source[0], {**table_source[1], **STAGES}


@pytest.fixture(scope="module")
def table(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("staged") / "table"
    sd_gym.tabulate(source[0], folder, decisions="random:4", seed=1, **source[1])
    return str(folder)


def test_its_masks_are_all_combinations_of_what_stages_say(table, source):
    core, computed = core_of(ID, table=table), core_of(source[0], **source[1])
    assert core.stages == computed.stages == STAGES["stages"]
    assert len(core.masks) == np.prod(core.nvec)
    for number, ways in enumerate(product(*map(range, core.nvec))):
        assert core.masks_of(np.array([ways])).tolist() == [number]
        (mask,) = core.to_masks(np.array([ways]))
        assert core.from_masks([mask]).tolist() == [list(ways)]
        for way, components in zip(ways, computed.stage_actions.components, strict=True):
            assert way or not mask[components].any()  # the first way of each stage runs all


def test_a_codebook_skips_nothing_before_the_first_stage(tmp_path, source):
    masks = np.zeros((2, len(core_of(source[0], **source[1]).mask_nvec)), dtype=int)
    masks[1, 1] = 1
    (tmp_path / "masks.json").write_text(json.dumps(masks.tolist()))
    keys = {**source[1], "stages": ["encoder.1", "encoder.2"], "decisions": f"codebook:{tmp_path / 'masks.json'}"}
    with pytest.raises(ValueError, match=r"skip before the first of the stages .*add 'first'"):
        sd_gym.tabulate(source[0], tmp_path / "table", **keys)
    assert not (tmp_path / "table").exists()


def test_outcomes_and_looks_are_those_of_the_env(table, source):
    core, computed = core_of(ID, table=table), core_of(source[0], **source[1])
    for name in SPLITS:
        ours, theirs = core.split(name), computed.split(name)
        rows = np.arange(len(theirs))
        looking = [each.observing_flops(split, rows, blind=True) for each, split in ((core, ours), (computed, theirs))]
        np.testing.assert_array_equal(*looking)
        for ways in product(*map(range, core.nvec)):
            decided = np.tile(ways, (len(rows), 1))
            masks = core.to_masks(decided)
            came, expected = core.score(ours, rows, decided), computed.score(theirs, rows, masks)
            np.testing.assert_array_equal(came.quality, expected.quality)
            np.testing.assert_array_equal(came.flops_ratio, expected.flops_ratio)
            for stage in range(len(core.stages)):
                seen, _ = core.stage_observer.observe(ours, rows, stage, decided, None)
                shown, _ = computed.stage_observer.observe(theirs, rows, stage, masks, None)
                np.testing.assert_allclose(seen, shown, atol=1e-4)  # a pass rounds by what else is in it


def test_episodes_are_those_of_the_env(table, source):
    """The same instances, the same ways: the same looks, rewards and infos."""
    ours, theirs = gym.make_vec(ID, num_envs=5, table=table), gym.make_vec(source[0], num_envs=5, **source[1])
    core, computed = ours.unwrapped.core, theirs.unwrapped.core
    random = np.random.default_rng(0)
    (seen, _), (shown, _) = ours.reset(seed=3), theirs.reset(seed=3)
    for step in range(2 * len(core.stages)):
        np.testing.assert_allclose(seen, shown, atol=1e-4)
        stage = step % len(core.stages)
        ways = random.integers(core.nvec[stage], size=5)
        decided = np.zeros((5, len(core.nvec)), dtype=np.int64)
        decided[:, stage] = ways
        components = computed.stage_actions.components[stage]
        actions = np.zeros((5, len(computed.stage_actions.choices)), dtype=np.int64)
        places = [*range(len(components) - 1), -1] if stage == 0 else np.arange(len(components))  # tokens come last
        actions[:, places] = core.to_masks(decided)[:, components]
        seen, *came, infos = ours.step(ways)
        shown, *expected, computed_infos = theirs.step(actions)
        assert_same(came, expected)
        assert_same(infos["decision"], computed_infos["decision"])
        assert_same(infos["quality"], computed_infos["quality"])


def test_it_is_a_table_of_masks_too(table):
    """All decided at the first look: the same ways lead to the same outcomes."""
    core, staged = core_of(ID, table=table, stages=["first"]), core_of(ID, table=table)
    assert core.stages == ["first"]
    np.testing.assert_array_equal(core.nvec, staged.nvec)
    assert gym.make(ID, table=table, stages=["first"]).action_space == gym.spaces.MultiDiscrete(core.nvec)
    ours, theirs = core.split("test"), staged.split("test")
    rows = np.arange(len(ours))
    np.testing.assert_array_equal(
        core.observe(ours, rows),
        staged.stage_observer.observe(theirs, rows, 0, np.zeros((len(rows), 3), int), None)[0],
    )
    for ways in product(*map(range, core.nvec)):
        decided = np.tile(ways, (len(rows), 1))
        masks = core.to_masks(decided)
        np.testing.assert_array_equal(core.from_masks(masks), decided)
        came, expected = core.score(ours, rows, decided), staged.score(theirs, rows, decided)
        np.testing.assert_array_equal(came.quality, expected.quality)
        np.testing.assert_array_equal(came.flops_ratio, expected.flops_ratio)
    with pytest.raises(ConfigError, match="can be chosen"):
        core_of(ID, table=table, stages=["first", "encoder.2"])


def test_ways_that_a_stage_has_not_are_masked_and_stand_for_its_last(table):
    env = gym.make(ID, table=table).unwrapped
    core = env.core
    widest = max(core.nvec)
    assert env.action_space == gym.spaces.Discrete(widest)
    _, info = env.reset(seed=0)
    for stage, ways in enumerate(core.nvec):
        assert info["action_mask"].tolist() == [1] * ways + [0] * (widest - ways)
        *_, over, _, info = env.step(widest - 1)
        assert over == (stage == len(core.nvec) - 1)
    assert info["decision"].tolist() == core.masks[-1].tolist()


def test_both_checkers_pass(table):
    env = gym.make(ID, table=table)
    check_env(env.unwrapped)
    check_sb3_env(env.unwrapped)


def test_a_table_that_was_cut_off_goes_on(table, source, tmp_path):
    calls = []

    def cut(done, total):
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    asked = {"decisions": "random:4", "seed": 1, **source[1]}
    with pytest.raises(KeyboardInterrupt):
        sd_gym.tabulate(source[0], tmp_path / "cut", on_progress=cut, **asked)
    sd_gym.tabulate(source[0], tmp_path / "cut", resume=True, **asked)
    assert contents_of(tmp_path / "cut") == contents_of(table)


@pytest.mark.parametrize("stages", [STAGES["stages"], ["first"]], ids=len)
@pytest.mark.parametrize("algo", ["ppo", "a2c", "reinforce", "imitation"])
def test_agents_learn_on_it_and_are_played_again(table, algo, stages, tmp_path):
    keys = ["--algo", algo, "--steps", "128", "--output", str(tmp_path / "run")]
    keys += ["--set", f"table={table}", "--set", f"stages=[{', '.join(stages)}]"]
    called("train", ID, *keys)
    assert "decides the same again" in called("validate", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "policy.json").read_text())["stages"] == stages


def test_more_combinations_than_a_table_has_are_told():
    core = core_of("SD/Classification-Mini-Layerwise-v0", **SMALL)
    with pytest.raises(ValueError, match=r"16 masks make .* combinations at the stages .* has at most 4,096"):
        combine_stages(core, random_masks(core.nvec, 16, 0))


def test_what_stages_show_is_kept_in_full(table):
    arrays, core = map_arrays(Path(table) / "train.safetensors"), core_of(ID, table=table)
    n, size = len(core.split("train")), core.observation_space.shape[0]
    first, second, _ = core.nvec
    assert arrays["observations.1"].shape == (n, first, size)
    assert arrays["observations.2"].shape == (n, first * second, size)


def test_reduced_observations_keep_what_stages_know_beside_hidden_states(table, source, tmp_path):
    sd_gym.tabulate(source[0], tmp_path / "reduced", decisions="random:4", seed=1, pca=4, **source[1])
    whole, reduced = core_of(ID, table=table), core_of(ID, table=str(tmp_path / "reduced"))
    before, after = len(whole.stages) + 1, whole.stage_observer.judges
    assert reduced.observation_space.shape == (before + 4 + after,)
    decided = np.ones((3, len(whole.nvec)), dtype=np.int64)
    for stage in range(len(whole.stages)):
        seen, shown = (
            core.stage_observer.observe(core.split("test"), np.arange(3), stage, decided, None)[0]
            for core in (whole, reduced)
        )
        np.testing.assert_allclose(shown[:, :before], seen[:, :before], atol=1e-3)
        np.testing.assert_allclose(shown[:, -after:], seen[:, -after:], atol=1e-2)


def test_processes_share_the_work(table, source, tmp_path):
    """They write what one writes, but for what rounding makes of another number of threads."""
    told = []
    asked = {"decisions": "random:4", "seed": 1, "jobs": 2, "on_progress": lambda *done: told.append(done)}
    sd_gym.tabulate(source[0], tmp_path / "shared", **asked, **source[1])
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]
    for name in SPLITS:
        ours, theirs = (map_arrays(Path(one) / f"{name}.safetensors") for one in (tmp_path / "shared", table))
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            np.testing.assert_allclose(ours[key], values, atol=1e-3)
