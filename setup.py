"""Which folders are packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

INSIDE = {"sd_gym.agents": "agents", "sd_gym.envs_configs": "envs_configs"}  # they stand at the top level here

packages = find_packages(include=["sd_gym", "sd_gym.*"])
for name, folder in INSIDE.items():
    packages += [name, *(f"{name}.{package}" for package in find_packages(folder))]
setup(packages=packages, package_dir=INSIDE)
