"""A policy that learned on a table leaves it: it decides the same on the env that the table is of, and on raw texts."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.reduction import reduce
from sd_gym.agents.experiment.replay import replay
from sd_gym.agents.learning.decisions import check_fits, decision_flops

import sd_gym
from sd_gym.envs import shared_core
from sd_gym.envs.actions import all_decisions
from sd_gym.envs.config import load_config
from sd_gym.envs.spaces import Standardised
from sd_gym.envs.table_files import EXPORT
from sd_gym.files import read_json, read_tensors, write_arrays, write_json, write_tensors
from sd_gym.going_on import masks_and_goes_on
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import config_of, shipped_tables
from tests.conftest import make_model, sign

ID, CLASSES = "SD/Table-v0", "SD/Classification-Custom-v0"
TOLD = ("quality", "quality_ref", "flops_ratio", "flops_ratio_with_policy", "skip_rate", "decisions_hash", "verdict")
KINDS = {
    "all": {},
    "all, reduced": {"pca": 3},
    "some": {"decisions": ["random:12", "path"]},
    "some, reduced, shared": {"decisions": ["random:12", "path"], "pca": 3, "share": True},
    "stages": {"decisions": ["random:4"], "stages": ["first", "encoder.1"]},
    "answer": {"decisions": ["random:4"], "stages": ["first", "encoder.1", "answer"], "pca": 3},
}


@pytest.fixture(scope="module", params=list(KINDS))
def learned(request, tmp_path_factory, table_source):
    """A run on a table of a kind, whose decisions differ between inputs, and what makes the env that computes."""
    folder, (env_id, settings) = tmp_path_factory.mktemp("off"), table_source
    sd_gym.tabulate(env_id, folder / "table", **KINDS[request.param], **settings)
    sd_gym.train(ID, "ppo", folder / "run", steps=512, confidence=0.5, table=str(folder / "table"), epsilon=1.0)
    varied(folder / "run")
    return folder / "run", env_id, settings


def varied(run):
    """Have a run's network decide differently on every input, and both its forms agree on it."""
    network = DecisionPolicy.load(run)
    torch.manual_seed(1)
    with torch.no_grad():
        network.head.weight.normal_()
        network.head.bias.zero_()
    network.save(run)
    if (run / "skip_policy.json").is_file():
        sign(run)
    return network


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_on_the_env_it_decides_as_on_the_table_and_the_same_comes_of_it(learned, split):
    """In one call, exactly; what reducing the observation costs included."""
    run, env_id, settings = learned
    looked_up = sd_gym.evaluate(ID, run, split)
    computed = sd_gym.evaluate(env_id, run, split, dataset=settings["dataset"], backbone=settings["backbone"])
    assert looked_up["decisions_used"] > 1
    for key in TOLD:
        assert computed[key] == looked_up[key], key
    assert computed["instances"] == looked_up["instances"]


def test_as_an_artefact_it_decides_the_same_on_texts_and_in_the_model(learned):
    run, env_id, settings = learned
    artefact = sd_gym.SkipPolicy.from_pretrained(run)
    core = shared_core(load_config(config_of(env_id), {**settings, "stages": artefact.network.stages}))
    split, every = core.split("test"), np.arange(len(core.split("test")))
    decisions = core.rollout(split, every, check_fits(artefact.network, core).decide)[0]
    masks, went_on = masks_and_goes_on(decisions, len(core.mask_nvec))
    assert len(np.unique(masks, axis=0)) > 1
    model = sd_gym.load(run, settings["backbone"])
    try:
        came = model([one.source for one in split.instances])
        np.testing.assert_array_equal([one.skip for one in came], masks[:, :-1])
        np.testing.assert_array_equal([one.token_level for one in came], masks[:, -1])
        np.testing.assert_array_equal([one.went_on for one in came], went_on)
        own = decision_flops(core, artefact.network, split, every) / split.costs.dense_flops(every)
        np.testing.assert_allclose([one.flops_ratio for one in came], split.costs.flops_ratio(every, decisions) + own)
        inputs = split.passes.inputs(every)
        model.model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        np.testing.assert_array_equal(model.model.decisions.skip, masks[:, :-1])
        np.testing.assert_array_equal(model.model.decisions.went_on, went_on)
    finally:
        sd_gym.detach(model.model)


def test_it_needs_neither_the_table_nor_the_data(learned, tmp_path):
    """Saved elsewhere and read there, its bolder and more cautious versions are the same."""
    run, *_ = learned
    artefact = sd_gym.SkipPolicy.from_pretrained(run)
    artefact.save_pretrained(tmp_path)
    again = sd_gym.SkipPolicy.from_pretrained(tmp_path)
    assert again.operating_points == artefact.operating_points
    assert again.card == artefact.card
    size = artefact.network.observation_size
    seen = np.random.default_rng(0).normal(size=(20, size)).astype(np.float32)
    if again.is_staged:
        seen[:, :2] = [1, 0]
    for margin in (-1.0, 0.0, 1000.0):
        ours, theirs = (one.with_margin(margin).network.decide(seen) for one in (again, artefact))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.shape == (20, 7 + artefact.has_answer_stage)
        assert margin < 1000 or not ours[:, :7].any()  # the last point is dense, whatever the table's numbers stand for


# --- the tables in the package --------------------------------------------------------------------------------------


def test_one_learns_on_the_table_of_the_mini_summarizer_and_attaches_the_result(tmp_path):
    """Instance by instance, the same decisions, qualities and FLOPs, on the env and on its texts."""
    run, few = tmp_path / "run", 24
    sd_gym.train("SD/Summarization-Mini-Table-v0", "ppo", run, steps=256)
    varied(run)
    sd_gym.evaluate("SD/Summarization-Mini-Table-v0", run, output=tmp_path / "table")
    result = sd_gym.evaluate("SD/Summarization-Mini-v0", run, output=tmp_path / "env", test_size=few)
    assert result["instances"] == few
    looked_up, computed = (columns(tmp_path / name / "instances.csv") for name in ("table", "env"))
    for name in ("decision", "quality", "quality_ref", "flops_ratio", "flops_ratio_with_policy"):
        assert computed[name] == looked_up[name][:few], name
    assert len({*computed["decision"]}) > 1
    assert replay(tmp_path / "env").instances == few
    split = shared_core(load_config(config_of("SD/Summarization-Mini-v0"), {"test_size": few})).split("test")
    model = sd_gym.load(run)
    try:
        came = model([one.source for one in split.instances])
        skipped = ["".join(str(int(bit)) for bit in one.skip) + str(one.token_level) for one in came]
        assert skipped == computed["decision"]
        right = [str(float(one.answer == known.target)) for one, known in zip(came, split.instances, strict=True)]
        assert right == [str(float(one)) for one in computed["quality"]]
    finally:
        sd_gym.detach(model.model)


def columns(file):
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("env_id", sorted(shipped_tables()))
def test_policies_can_leave_every_table_in_the_package(env_id):
    """What they take along is that of the backbone and the observations of the table."""
    core = shared_core(load_config(config_of(env_id), {}))
    exported = core.export()
    assert exported.env.id == core.description["env"]
    assert exported.env.table is None
    assert exported.backbone["weights"] == core.backbone.weights
    seen, before = core.observation.projection.mean.shape, (0,)
    if core.is_staged:  # each stage is standardised by itself, all but the stage and the FLOPs
        seen, before = (len(core.stages), *seen), (0, len(core.stages) + 1)
    assert exported.mean.shape == exported.deviation.shape == tuple(np.subtract(seen, before))
    assert (exported.deviation > 0).all()
    if core.exhaustive:
        assert exported.masks is None
    else:
        decisions, size = all_decisions(core.nvec), len(core.mask_nvec)
        np.testing.assert_array_equal(exported.masks[:, :size], core.to_masks(decisions))
        np.testing.assert_array_equal(exported.masks[:, size:], decisions[:, core.n_skips :])
        assert {*map(tuple, exported.masks[:, :size])} == {*map(tuple, core.masks)}


def test_a_backbone_that_the_project_does_not_have_is_asked_for(tmp_path):
    run = tmp_path / "run"
    sd_gym.train("SD/Classification-TREC-Table-v1", "dense", run)
    for call in (lambda: sd_gym.load(run), lambda: sd_gym.evaluate(CLASSES, run)):
        with pytest.raises(FileNotFoundError, match=r"'minilm-trec', was a local folder .* the same bert as backbone="):
            call()
    assert "backbone=" in (run / "README.md").read_text()


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reduced(tmp_path_factory, table_source):
    """A table of some masks with reduced observations, and a run on it."""
    folder, (env_id, settings) = tmp_path_factory.mktemp("reduced"), table_source
    sd_gym.tabulate(env_id, folder / "table", decisions="random:12", pca=3, **settings)
    sd_gym.train(ID, "ppo", folder / "run", steps=256, confidence=0.5, table=str(folder / "table"), epsilon=1.0)
    varied(folder / "run")
    return folder


def test_another_backbone_is_told(reduced, table_source, tmp_path):
    """Also where it is asked for by name."""
    env_id, settings = table_source
    other = make_model("bert")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    shutil.copytree(settings["backbone"], tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    keys = {"dataset": settings["dataset"], "backbone": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="has other weights than in training"):
        sd_gym.evaluate(env_id, reduced / "run", **keys)
    with pytest.raises(ValueError, match="the weights are not those of"):
        sd_gym.load(reduced / "run", keys["backbone"])
    with pytest.raises(ValueError, match="has other weights than in training"):
        sd_gym.evaluate("SD/Classification-Mini-v0", reduced / "run")


def test_other_data_than_the_tables_are_told(reduced, table_source):
    """Unless they are asked for by name."""
    env_id, settings = table_source
    file = Path(settings["dataset"])
    was = file.read_text()
    try:
        file.write_text(was.replace("the ", "not "))
        with pytest.raises(ValueError, match="the data have changed"):
            sd_gym.evaluate(env_id, reduced / "run")
        assert sd_gym.evaluate(env_id, reduced / "run", dataset=str(file))["instances"] > 0
    finally:
        file.write_text(was)


def test_reduced_to_few_masks_it_leaves_too(reduced, table_source, tmp_path):
    result = reduce(reduced / "run", 2, tmp_path / "few")
    computed = sd_gym.evaluate(table_source[0], tmp_path / "few")
    for key in TOLD:
        assert computed[key] == result[key], key
    assert computed["decisions_used"] <= 2


@pytest.mark.parametrize("algo", ["blind-ppo", "hash", "static"])
def test_so_do_policies_that_see_nothing(algo, reduced, table_source, tmp_path):
    """One that is blind pays for no reduction."""
    looked_up = sd_gym.train(ID, algo, tmp_path, steps=128, table=str(reduced / "table"))
    computed = sd_gym.evaluate(table_source[0], tmp_path)
    for key in TOLD:
        assert computed[key] == looked_up[key], key


def test_the_result_on_the_env_stands_beside_the_run(reduced, table_source, tmp_path):
    sd_gym.evaluate(table_source[0], reduced / "run", output=tmp_path / "env")
    said = json.loads((tmp_path / "env" / "config.json").read_text())
    of_run = json.loads((reduced / "run" / "config.json").read_text())
    assert said["env"] == table_source[0]
    assert {key: said[key] for key in ("algo", "seed", "steps")} == {
        key: of_run[key] for key in ("algo", "seed", "steps")
    }
    replay(tmp_path / "env")


def test_a_run_on_a_table_without_what_deciding_takes_has_no_artefact(reduced, table_source, tmp_path):
    """The run stands, on the table."""
    table = Path(shutil.copytree(reduced / "table", tmp_path / "table"))
    (table / EXPORT).unlink()
    result = sd_gym.train(ID, "ppo", tmp_path / "run", steps=128, table=str(table))
    assert result["artefact"] is None
    with pytest.raises(ValueError, match=r"decides by indices of masks, and no skip_policy\.json"):
        sd_gym.evaluate(table_source[0], tmp_path / "run")
    assert sd_gym.evaluate(ID, tmp_path / "run")["quality"] == result["quality"]


def test_what_is_at_one_stage_of_several_stays(table_source, tmp_path):
    """It sees the first of several looks, which an env of one look does not show."""
    env_id, settings = table_source
    table = str(tmp_path / "table")
    sd_gym.tabulate(env_id, table, decisions="random:4", stages=["first", "encoder.1"], **settings)
    result = sd_gym.train(ID, "dense", tmp_path / "run", table=table, stages=["first"])
    assert result["artefact"] is None


def test_a_users_observation_stays(table_source, tmp_path):
    class Length(Standardised):
        def features(self, split, rows):
            return split.encoded.source_length[rows, None]

    sd_gym.register_observation("off_table_length", Length)
    env_id, settings = table_source
    keys = {"observation": "off_table_length", **settings}
    sd_gym.tabulate(env_id, tmp_path / "table", decisions="random:4", **keys)
    assert not (tmp_path / "table" / EXPORT).exists()
    result = sd_gym.train(ID, "dense", tmp_path / "run", table=str(tmp_path / "table"))
    assert result["artefact"] is None


def test_files_that_do_not_belong_together_are_refused(reduced, tmp_path):
    for number, change in enumerate(
        (
            lambda said, tensors: tensors["masks"].add_(2),
            lambda said, tensors: tensors.update(masks=tensors["masks"][:-1]),
            lambda said, tensors: tensors.update(masks=tensors["masks"].float()),
            lambda said, tensors: tensors.pop("masks"),
            lambda said, tensors: tensors.pop("projection.mean"),
            lambda said, tensors: tensors["projection.components"].mul_(torch.nan),
            lambda said, tensors: tensors.update({"projection.components": torch.zeros(2, 34)}),
            lambda said, tensors: said["table"].pop("nvec"),
            lambda said, tensors: said.update(table=[]),
            lambda said, tensors: said.pop("table"),
        )
    ):
        folder = Path(shutil.copytree(reduced / "run", tmp_path / str(number)))
        said, tensors = read_json(folder / "skip_policy.json"), read_tensors(folder / "skip_policy.safetensors")
        change(said, tensors)
        write_tensors(folder / "skip_policy.safetensors", tensors)
        write_json(folder / "skip_policy.json", said)
        sign(folder)
        with pytest.raises(ValueError, match=r"skip_policy\.json"):
            sd_gym.SkipPolicy.from_pretrained(folder)


def test_a_damaged_table_is_told(reduced, tmp_path):
    for number, change in enumerate(
        (
            lambda file, said: write_arrays(file, {"mean": np.zeros(3)}),
            lambda file, said: said.update(protection={"special": [1]}),
            lambda file, said: said.pop("protection"),
        )
    ):
        folder = Path(shutil.copytree(reduced / "table", tmp_path / str(number)))
        said = read_json(folder / "table.json")
        change(folder / EXPORT, said)
        write_json(folder / "table.json", said)
        with pytest.raises(ValueError, match="is damaged"):
            shared_core(load_config(config_of(ID), {"table": str(folder)})).export()
