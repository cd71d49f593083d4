"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import sd_gym.agents

import sd_gym
from sd_gym.switch import architectures

PACKAGES = (sd_gym, sd_gym.agents)
MODULES = sorted(
    {module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
)


def test_every_package_is_looked_at():
    for name in ("sd_gym.switch.switchboard", "sd_gym.envs.spaces", "sd_gym.agents.experiment.api"):
        assert name in MODULES


@pytest.mark.parametrize("name", ["sd_gym", *(name for name in MODULES if not name.endswith("__main__"))])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(architectures, "_REGISTRY", dict(architectures._REGISTRY))  # one example adds to it
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
