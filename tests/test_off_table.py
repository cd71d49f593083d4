"""A policy that learned on a table leaves it: it decides the same on the env that the table is of, and on raw texts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sd_gym.agents.experiment.evaluation import deciding_flops, fitting

import sd_gym
from sd_gym.envs import shared_core
from sd_gym.envs.config import load_config
from sd_gym.envs.table import LEAVING, read_description, table_folder
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.off_table import OffTable
from sd_gym.registration import config_of, shipped_tables
from tests.conftest import write_reviews

ID, CLASSES = "SD/Table-v0", "SD/Classification-Custom-v0"
TOLD = ("quality", "quality_ref", "flops_ratio", "flops_ratio_with_policy", "skip_rate", "decisions_hash", "verdict")
KINDS = {
    "all": {},
    "all, reduced": {"pca": 3},
    "some": {"decisions": ["random:12", "path"]},
    "some, reduced, shared": {"decisions": ["random:12", "path"], "pca": 3, "share": True},
    "stages": {"decisions": ["random:4"], "stages": ["first", "encoder.1"]},
}


@pytest.fixture(scope="module", params=list(KINDS))
def learned(request, tmp_path_factory, table_source):
    """A run on a table of a kind, whose decisions differ between inputs, and what makes the env that computes."""
    folder, (env_id, settings) = tmp_path_factory.mktemp("off"), table_source
    sd_gym.tabulate(env_id, folder / "table", **KINDS[request.param], **settings)
    sd_gym.train(ID, "ppo", folder / "run", steps=512, strictness=0, table=str(folder / "table"), epsilon=1.0)
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
    decisions = core.walk(split, every, fitting(artefact.network, core).decide)[0]
    assert len(np.unique(decisions, axis=0)) > 1
    model = sd_gym.load(run, settings["backbone"])
    try:
        came = model([one.source for one in split.instances])
        np.testing.assert_array_equal([one.skip for one in came], decisions[:, :-1])
        np.testing.assert_array_equal([one.token_level for one in came], decisions[:, -1])
        own = deciding_flops(core, artefact.network, split, every) / split.costs.dense_flops(every)
        np.testing.assert_allclose([one.flops_ratio for one in came], split.costs.flops_ratio(every, decisions) + own)
        inputs = split.passes.inputs(every)
        model.model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        np.testing.assert_array_equal(model.model.decisions.skip, decisions[:, :-1])
    finally:
        sd_gym.detach(model.model)
