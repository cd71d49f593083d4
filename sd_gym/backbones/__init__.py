"""Backbones: loading one, what its first layer reads, and preparing it to bear skipping."""

from sd_gym.backbones.embedding import first_layer_input, pooled
from sd_gym.backbones.load import Backbone, load_backbone, load_model
from sd_gym.backbones.prepare import prepare

__all__ = ["Backbone", "first_layer_input", "load_backbone", "load_model", "pooled", "prepare"]
