"""The embedded default: three generated tasks that need no download.

Every instance belongs to exactly one split, decided by a hash of its text, so that the splits are disjoint however
many instances are drawn. One word-level vocabulary and one small backbone serve all three tasks; a task word in
front of the input tells which one is asked.
"""

from sd_gym.tasks.procedural.generate import LEVELS, SPLITS, TASKS, generate_split, stream, vocabulary

__all__ = ["LEVELS", "SPLITS", "TASKS", "generate_split", "stream", "vocabulary"]
