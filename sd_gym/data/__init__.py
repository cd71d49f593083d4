"""Data that all packages share: an instance, and a split of instances as tensors."""
