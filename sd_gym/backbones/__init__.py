"""Backbones: loading one, and preparing it to be robust to skipping."""

from sd_gym.backbones.load import Backbone, load_backbone, load_model
from sd_gym.backbones.prepare import Recipe, prepare

__all__ = ["Backbone", "Recipe", "load_backbone", "load_model", "prepare"]
