"""Tables: the env that looks up is the env that computes; what is exactly known of one; what is damaged is told."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sd_gym.agents.experiment.replay import ReplayError, replay
from sklearn.decomposition import PCA
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.envs import ConfigError, Outcome, TableEnv, TableVectorEnv, shared_core
from sd_gym.envs.config import load_config
from sd_gym.envs.regret import regret, static_regret
from sd_gym.envs.sb3 import SwitchableVecEnv
from sd_gym.envs.table import table_core
from sd_gym.envs.tabulate import _smallest
from sd_gym.execution.scoring import Scoring
from sd_gym.files import map_arrays, write_arrays
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import config_of
from sd_gym.registry import UnknownNameError
from tests.envs.conftest import SMALL, STEP_INFO
from tests.envs.test_conventions import assert_same

ID = "SD/Table-v0"
SPLITS = ("train", "validation", "test")


def core_of(env_id, **keys):
    return shared_core(load_config(config_of(env_id), keys))


@pytest.fixture(params=["full", "some"])
def table(request, full_table, small_table):
    return full_table if request.param == "full" else small_table


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
    assert looked_up.data.identity() == computed.data.identity()
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


def test_steps_are_those_of_the_env(full_table, table_source):
    """The same seeds and actions: the same observations, rewards and infos."""
    ours = gym.make_vec(ID, num_envs=5, table=full_table, objective="scalarized", epsilon=0.0)
    theirs = gym.make_vec(table_source[0], num_envs=5, objective="scalarized", epsilon=0.0, **table_source[1])
    assert ours.single_action_space == theirs.single_action_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert_same(ours.reset(seed=3), theirs.reset(seed=3))
    random = np.random.default_rng(0)
    for _ in range(4):
        actions = random.integers(2, size=ours.action_space.shape)
        assert_same(ours.step(actions), theirs.step(actions))


def test_the_number_of_a_mask_stands_for_it(small_table, table_source):
    masks = np.array(json.loads((Path(small_table) / "codebook.json").read_text()))
    assert not masks[0].any()
    ours = gym.make(ID, table=small_table)
    theirs = gym.make(table_source[0], action="discrete", codebook=small_table, **table_source[1])
    assert ours.action_space == theirs.action_space == gym.spaces.Discrete(len(masks))
    for number, mask in enumerate(masks):
        assert_same(ours.reset(seed=number), theirs.reset(seed=number))
        came = ours.step(number)
        assert_same(came, theirs.step(number))
        np.testing.assert_array_equal(came[4]["decision"], mask)


def test_both_checkers_pass(table):
    env = gym.make(ID, table=table)
    check_env(env.unwrapped)
    check_sb3_env(env.unwrapped)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_envs_are_as_gymnasium_has_them(mode, table):
    """As ``SyncVectorEnv`` of single envs in all modes, seeds a list; a twin does the same."""
    ours, twin = (gym.make_vec(ID, num_envs=3, autoreset_mode=mode, table=table) for _ in range(2))
    made = [lambda: gym.make(ID, table=table) for _ in range(3)]
    theirs = SyncVectorEnv(made, autoreset_mode=mode)
    seeds = [4, 5, 6]
    observations, infos = ours.reset(seed=seeds)
    assert_same((observations, infos), twin.reset(seed=seeds))
    np.testing.assert_array_equal(observations, theirs.reset(seed=seeds)[0])
    ours.action_space.seed(0)
    for _ in range(4):
        actions = ours.action_space.sample()
        came = ours.step(actions)
        assert_same(came, twin.step(actions))
        for mine, yours in zip(came[:4], theirs.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(mine, yours)
        if mode == AutoresetMode.DISABLED:
            options = {"reset_mask": np.ones(3, dtype=bool)}
            assert_same(ours.reset(options=options), twin.reset(options=options))
            theirs.reset(options=options)
    assert set(came[4].get("final_info", came[4])) >= STEP_INFO


def test_copies_go_on_alike(table):
    env = gym.make_vec(ID, num_envs=3, table=table).unwrapped
    env.reset(seed=1)
    twins = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    assert all(twin.core is env.core for twin in twins)
    again = gym.make_vec(ID, num_envs=3, table=table).unwrapped
    again.reset(seed=9)
    again.load_state(json.loads(json.dumps(env.state())))
    actions = env.action_space.sample()
    came = env.step(actions)
    for twin in (*twins, again):
        assert_same(came, twin.step(actions))


def test_stable_baselines3_takes_it(table):
    env = SwitchableVecEnv(gym.make_vec(ID, num_envs=3, table=table).unwrapped)
    env.reset()
    actions = np.array([env.action_space.sample() for _ in range(3)])
    _, rewards, dones, infos = env.step(actions)
    assert rewards.shape == (3,)
    assert dones.all()
    assert set(infos[0]) >= STEP_INFO | {"terminal_observation"}


def test_neither_torch_nor_a_data_set_is_needed(table):
    program = (
        "import sys\n"
        "blocked = ('torch', 'transformers', 'datasets', 'tokenizers', 'stable_baselines3', 'scipy', 'sklearn',\n"
        "           'matplotlib', 'accelerate', 'tensorboard')\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import gymnasium as gym, sd_gym\n"
        f"for env in (gym.make('SD/Table-v0', table={table!r}),\n"
        f"            gym.make_vec('SD/Table-v0', num_envs=4, table={table!r})):\n"
        "    env.reset(seed=0)\n"
        "    env.step(env.action_space.sample())\n"
        "from sd_gym.envs.regret import static_regret\n"
        "print(static_regret(env.unwrapped.core.split('test')))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- small enough to be passed on -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_table(tmp_path_factory, table_source):
    """A table of some decisions, with reduced observations and nothing that is not to be passed on."""
    folder = tmp_path_factory.mktemp("tables") / "shared"
    codebook = folder.parent / "masks.json"
    codebook.write_text(json.dumps([[0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, 0]]))
    chosen = ["random:6", f"codebook:{codebook}"]
    sd_gym.tabulate(table_source[0], folder, decisions=chosen, pca=3, share=True, **table_source[1])
    return str(folder)


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


def test_reducing_is_part_of_what_a_policy_costs(shared_table, small_table, tmp_path):
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
    assert ours.data.identity()["test"]["hash"] == theirs.data.identity()["test"]["hash"]
    assert ours.description["chosen"] == "random:6 and codebook:masks.json, seed 0"
    assert ours.config.data.dataset == "reviews.jsonl"
    written = b"".join(contents_of(shared_table).values())
    secret = [table_source[1]["dataset"], table_source[1]["backbone"], *(one.source for one in source.instances)]
    assert not [one for one in secret if one.encode() in written]


def test_numbers_are_kept_in_the_smallest_type_that_holds_them(shared_table):
    """And never in one that does not."""
    kinds = {name: values.dtype for name, values in map_arrays(Path(shared_table) / "train.safetensors").items()}
    expected = {"quality": np.uint8, "likelihood": np.float16, "observations": np.float16, "costs": np.uint8}
    expected |= dict.fromkeys(("difficulty", "levels", "source_length", "fact.source_length"), np.uint8)
    assert {name: kinds[name] for name in expected} == {name: np.dtype(kind) for name, kind in expected.items()}
    assert _smallest([0.5, 2.0**-24]).dtype == np.float16
    assert _smallest([0.1]).dtype == np.float64
    assert _smallest(np.array([0.1], np.float32)).dtype == np.float32
    assert _smallest([1e300]).dtype == np.float64
    assert _smallest([70_000]).dtype == np.int64
    assert _smallest([-1]).dtype == np.int64
    assert _smallest([True]).dtype == np.bool_


def test_a_run_on_a_table_is_played_again(table, tmp_path):
    """Its decisions are recorded as masks, also where an action is the number of one."""
    sd_gym.train(ID, "hash", tmp_path / "run", steps=1, table=table)
    assert replay(tmp_path / "run").decided
    file = tmp_path / "run" / "instances.csv"
    lines = file.read_text().splitlines()
    other = next(one for one in ("1" * 7, "0" * 7) if f",{one}," not in lines[1])
    was = next(cell for cell in lines[1].split(",") if len(cell) == 7 and set(cell) <= {"0", "1"})
    file.write_text("\n".join([lines[0], lines[1].replace(was, other), *lines[2:]]) + "\n")
    with pytest.raises(ReplayError, match="decisions were changed"):
        replay(tmp_path / "run")


# --- making one -----------------------------------------------------------------------------------------------------


def contents_of(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.name != ".lock"}


def test_a_table_that_was_cut_off_goes_on_and_becomes_the_same(tmp_path, monkeypatch, table_source, small_table):
    env_id, keys = table_source
    asked = {"decisions": ["random:16"], "pca": 4, **keys}
    monkeypatch.setattr("sd_gym.envs.tabulate.CHUNK", 7)
    whole = tmp_path / "whole"
    sd_gym.tabulate(env_id, whole, **asked)
    under_all, calls = Scoring.under_all, []

    def killed(self, rows, masks):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return under_all(self, rows, masks)

    monkeypatch.setattr(Scoring, "under_all", killed)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sd_gym.tabulate(env_id, cut, **asked)
    with pytest.raises(ValueError, match="not complete; go on with sd-gym tabulate --resume"):
        gym.make(ID, table=str(cut))
    with pytest.raises(FileExistsError, match="cut off; go on with --resume"):
        sd_gym.tabulate(env_id, cut, **asked)
    with pytest.raises(ValueError, match="another chosen"):
        sd_gym.tabulate(env_id, cut, resume=True, decisions="random:3", pca=4, **keys)
    done = []
    sd_gym.tabulate(env_id, cut, resume=True, on_progress=lambda *counts: done.append(counts), **asked)
    assert contents_of(cut) == contents_of(whole)
    assert done[-1][0] == done[-1][1]
    # The chunk that was cut off is the only one that ran twice; the four before it are told of at once.
    assert len(calls) == len(done) + 4
    with pytest.raises(FileExistsError, match="holds a table"):
        sd_gym.tabulate(env_id, cut, resume=True, **asked)


def test_another_folder_is_left_alone(tmp_path, table_source):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it holds mine\.txt"):
        sd_gym.tabulate(table_source[0], tmp_path, **table_source[1])
    assert contents_of(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"decisions": "most"}, ValueError, "expected all, random:N, path, codebook or codebook:FILE, got 'most'"),
        ({"decisions": "random:0"}, ValueError, "got 'random:0'"),
        ({"decisions": ["all", "path"]}, ValueError, "'all' stands alone"),
        ({"decisions": "codebook:none.json"}, FileNotFoundError, r"no codebook at none\.json"),
        ({"instances": 0}, ValueError, "at least one instance"),
        ({"pca": 0}, ValueError, "--pca: expected at least 1 component"),
        ({"pca": 1000}, ValueError, "no more than there are training instances"),
        ({"observation": "tokens"}, ConfigError, "observations that are one array"),
        ({"stages": ["first", "encoder.1"], "pca": 4}, ConfigError, "reduces what one stage shows"),
        ({"epsilom": 1}, ConfigError, "did you mean 'reward.epsilon'"),
    ],
)
def test_what_cannot_be_tabulated_is_told(keys, error, words, tmp_path, table_source):
    with pytest.raises(error, match=words):
        sd_gym.tabulate(table_source[0], tmp_path / "table", **{**table_source[1], **keys})
    assert not (tmp_path / "table").exists()


def test_a_table_is_not_tabulated(full_table, tmp_path):
    with pytest.raises(ConfigError, match="is a table itself"):
        sd_gym.tabulate(ID, tmp_path / "again", table=full_table)
    with pytest.raises(UnknownNameError):
        sd_gym.tabulate("SD/Nothing-v0", tmp_path / "again")


def test_the_command(tmp_path, table_source):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in table_source[1].items()]
    asked = ["tabulate", table_source[0], "--output", str(tmp_path / "table"), "--decisions", "random:3", *sets]
    done = CliRunner().invoke(app, [*asked, "--instances", "5", "--seed", "2"])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "table" / "table.json").read_text())
    counts = ", ".join(f"{one['instances']} of {name}" for name, one in said["splits"].items())
    assert f"3 decisions (random:3, seed 2) on instances: {counts}" in done.output
    assert said["splits"]["train"]["instances"] == 5
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2


# --- what is wrong with one -----------------------------------------------------------------------------------------


def edited(folder, **values):
    said = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps({**said, **values}))


def shortened(folder):
    file = folder / "test.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def swapped(folder):
    shutil.copy(folder / "train.safetensors", folder / "test.safetensors")


def recosted(folder):
    arrays = {name: np.array(values) for name, values in map_arrays(folder / "test.safetensors").items()}
    arrays["costs"][0] = len(arrays["switched"])
    write_arrays(folder / "test.safetensors", arrays)


DAMAGES = {
    "another version": (lambda folder: edited(folder, format=1), "expected a table of format 2, got 1"),
    "not complete": (lambda folder: edited(folder, complete=False), "not complete"),
    "no switches": (lambda folder: edited(folder, backbone=None), "'backbone' is None"),
    "no JSON": (lambda folder: (folder / "table.json").write_text("{"), "damaged: expected JSON"),
    "no table": (lambda folder: (folder / "table.json").unlink(), r"no table\.json in .*; expected a table"),
    "no split": (lambda folder: (folder / "test.safetensors").unlink(), r"no test\.safetensors"),
    "cut": (shortened, "damaged: expected safetensors"),
    "swapped": (swapped, "damaged: expected quality of shape"),
    "no ids": (lambda folder: (folder / "test.json").write_text("{}"), "expected the ids of"),
    "no codebook": (lambda folder: (folder / "codebook.json").unlink(), r"codebook\.json"),
    "other costs": (recosted, "instances have costs that it lacks"),
    "no projection": (lambda folder: edited(folder, pca=3), r"no projection\.safetensors"),
    "other masks": (lambda folder: (folder / "codebook.json").write_text("[[0, 0]]"), "expected 7: one for each of"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_table_is_told(what, small_table, tmp_path):
    folder = tmp_path / "table"
    shutil.copytree(small_table, folder)
    damage, words = DAMAGES[what]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        gym.make(ID, table=str(folder)).reset(options={"split": "test"})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "'table' has no value; pass the folder of one"),
        ({"backbone": "mini"}, "the table .* is of .*, got 'mini'; of a table only split, stages, reward.objective"),
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
    with pytest.raises(ValueError, match=f"it is the env {ID} that takes the folder of a table"):
        gym.make("SD/Classification-Mini-v0", disable_env_checker=True, table=full_table)


@pytest.mark.parametrize("shell", [TableEnv, TableVectorEnv])
@pytest.mark.parametrize("asked", [{"render_mode": "ansi"}, {"info_text": True}])
def test_a_table_has_nothing_to_show(shell, asked, full_table):
    with pytest.raises(ValueError, match="no texts, so there is nothing to show"):
        shell("table.yaml", table=full_table, **asked)


def test_a_table_lists_no_texts(full_table):
    with pytest.raises(ValueError, match="a table has none of the texts"):
        sd_gym.instances(ID, table=full_table)


# --- what is exactly known ------------------------------------------------------------------------------------------


def matrices(split):
    """Quality and FLOPs ratio of all rows under all masks, one decision after the other."""
    core, rows = split.core, np.arange(len(split))
    decisions = core.masks if core.exhaustive else np.arange(len(core.masks))[:, None]
    came = [core.score(split, rows, np.tile(decision, (len(rows), 1))) for decision in decisions]
    return np.stack([one.quality for one in came], axis=1), np.stack([one.flops_ratio for one in came], axis=1)


def test_regret_is_what_the_best_reward_of_each_instance_is_more(full_table):
    split = core_of(ID, table=full_table).split("test")
    quality, flops = matrices(split)
    kept = quality >= quality[:, :1] - split.config.reward.epsilon
    rewards = np.where(
        kept, 1 - flops, -split.config.reward.penalty * (quality[:, :1] - split.config.reward.epsilon - quality)
    )
    decision = np.array([1, 0, 1, 0, 0, 0, 1])

    def policy(observations):
        return np.tile(decision, (len(observations), 1))

    number = int(np.flatnonzero((split.core.masks == decision).all(axis=1))[0])
    lost = regret(split, policy)
    np.testing.assert_allclose(lost, rewards.max(axis=1) - rewards[:, number], atol=1e-12)
    best = rewards.max(axis=1).mean()
    assert static_regret(split) == pytest.approx(best - max(rewards.mean(axis=0)))
    assert 0 <= static_regret(split) <= lost.mean()
    with pytest.raises(ValueError, match="expected actions of shape"):
        regret(split, lambda observations: np.zeros((len(observations), 2), dtype=int))


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
        ("early-exit", full_table, "a table has no backbone"),
        ("every-other", small_table, "this table has some masks only"),
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
    table_core.cache_clear()
    with pytest.raises(ValueError, match="has other weights than in training"):
        sd_gym.evaluate(ID, tmp_path / "other")
