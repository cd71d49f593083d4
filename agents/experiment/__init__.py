"""Runs: training, selection, evaluation, comparison, tuning and replay."""
