"""Exported policies in ONNX Runtime, without torch: see ``load``."""

from sd_gym.inference.onnx import OnnxModel, load

__all__ = ["OnnxModel", "load"]
