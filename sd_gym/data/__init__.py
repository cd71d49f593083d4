"""What every package passes around: one instance, and a split of them as tensors."""
