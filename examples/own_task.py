"""Your own family of tasks: translation, with its metric and token ranking, for any backbone that generates.

python examples/own_task.py pairs.jsonl my-opus-mt
sd-gym train SD/Summarization-Custom-v0 --import examples/own_task.py --set task=translation --set metric=chrf ...
"""

import sys
from collections import Counter

import gymnasium as gym

import sd_gym
from sd_gym.tasks.summarization import TextToText

ENV = "SD/Summarization-Custom-v0"  # any env does: all its keys can be set
SETTINGS = {"task": "translation", "metric": "chrf", "quality": "metric"}  # rewards are made of the metric itself
TOKENS = {"token_shares": [0.0, 0.2], "token_ranking": "frequent-first"}


def chrf(text, references):
    """F1 of the three-character sequences that two texts share; the best over the references."""

    def runs(words):
        return Counter(words[start : start + 3] for start in range(max(1, len(words) - 2)))

    def f1(one, other):
        return 2 * (one & other).total() / (one.total() + other.total())

    return max(f1(runs(text), runs(reference)) for reference in references)


def frequent_first(encoded, board, rarity):
    """Scores [n, longest]; the lowest are dropped first. Most vocabularies number words from frequent to rare."""
    return encoded.input_ids.numpy()


def main(dataset, backbone, steps=20_000, output="runs/own-task", **settings):
    """Rows are such as {"german": "Guten Tag", "english": "Good day"}."""
    settings = {"dataset": dataset, "backbone": backbone, **SETTINGS, **TOKENS, **settings}
    env = gym.make(ENV, **settings)
    _, info = env.reset(seed=0)
    _, reward, *_, info = env.step(env.action_space.sample())
    print(f"{info['instance']}: chrf {info['quality']:.2f}, densely {info['quality_ref']:.2f}, reward {reward:.2f}")
    return sd_gym.train(ENV, "ppo", output, steps=steps, **settings)


sd_gym.register_metric("chrf", of_text=chrf)
sd_gym.register_ranking("frequent-first", frequent_first)
sd_gym.register_task("translation", TextToText("german", "english", metrics=("chrf", "exact_match")))
if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3])["metrics"])
