"""Backbones: loading one, and preparing it to bear skipping."""

from sd_gym.backbones.load import Backbone, load_backbone, load_model
from sd_gym.backbones.prepare import prepare

__all__ = ["Backbone", "load_backbone", "load_model", "prepare"]
