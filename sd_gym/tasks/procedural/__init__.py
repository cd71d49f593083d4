"""Three generated tasks, which need no download.

A hash of an instance's text decides on its split, so the splits are disjoint however many instances are drawn. The
tasks share one word-level vocabulary and the small bundled backbone. An input begins with a word that names its task.
"""

from sd_gym.tasks.procedural.generate import LEVELS, TASKS, generate_split, stream, vocabulary

__all__ = ["LEVELS", "TASKS", "generate_split", "stream", "vocabulary"]
