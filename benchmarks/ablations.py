"""The paper's ablations, one command each: what a choice is worth, as a table.

    python benchmarks/ablations.py candidates
    python benchmarks/ablations.py objective --env SD/Classification-TREC-Table-v0 --seeds 0 1 2 3 4

Every row is trained alike, but for what it is about; each figure is that of ``from_nothing.py``: FLOPs with the
policy's own, points of quality lost, as learned and as selected. Rows that several ablations share are trained once.
``--env`` takes another env than the Mini classifier, such as a table, where all rows of the ablation can be on it.
What is finished is kept and what was cut off goes on; ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from from_nothing import COLUMNS, cell, show
from sd_gym.agents.experiment.many import train_many
from sd_gym.agents.experiment.plan import Planned
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.runs.folder import read_result
from torch import nn

from sd_gym import register_network

MINI, SUMMARIES = "SD/Classification-Mini-v0", "SD/Summarization-Mini-v0"
Row = tuple[str, str, dict[str, Any]]  # env, agent, settings
KINDS = ("attention", "cross_attention", "feed_forward")
SHARES = [0.0, 0.25, 0.5]


def hidden_layers(widths: tuple[int, ...], features: int, logits: int) -> nn.Sequential:
    """A policy network with hidden layers of these widths."""
    sizes = (features, *widths)
    hidden = [(nn.Linear(size, width), nn.Tanh()) for size, width in zip(sizes, widths, strict=False)]
    return nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(sizes[-1], logits))


NETWORKS = {"linear": (), **{f"two hidden layers of {width}": (width, width) for width in (8, 64, 256)}}
for name, widths in NETWORKS.items():
    register_network(name, partial(hidden_layers, widths))


def scalarized(weight: float) -> Row:
    """The weighted sum that the paper compares with."""
    return MINI, "ppo", {"objective": "scalarized", "penalty": weight}


ABLATIONS: dict[str, dict[str, Row]] = {
    "candidates": {
        "attention and cross-attention": (SUMMARIES, "reinforce", {"candidates": KINDS[:2]}),
        "feed-forward": (SUMMARIES, "reinforce", {"candidates": KINDS[2:]}),
        "tokens": (SUMMARIES, "reinforce", {"candidates": (), "token_shares": SHARES}),
        "all sublayers": (SUMMARIES, "reinforce", {}),
        "all sublayers and tokens": (SUMMARIES, "reinforce", {"token_shares": SHARES}),
    },
    "objective": {
        "lexicographic": (MINI, "ppo", {}),
        "scalarized, weight 1": scalarized(1),
        "scalarized, weight 5": scalarized(5),
        "scalarized, weight 20": scalarized(20),
        "Lagrangian": (MINI, "ppo_lagrangian", {}),
        "two value heads": (MINI, "ppo_lex", {}),
        "dynamic barrier (REINFORCE)": (MINI, "reinforce", {}),
    },
    "observation": {
        "pooled embeddings": (MINI, "ppo", {}),
        "tokens, as many channels as 1% of the FLOPs": (MINI, "ppo", {"observation": "tokens"}),
        "tokens, 8 channels": (MINI, "ppo", {"observation": "tokens", "channels": 8}),
    },
    "size": {name: (MINI, "ppo", {"network": name}) for name in NETWORKS},
    "stages": {
        "one": (MINI, "ppo", {}),
        "three": ("SD/Classification-Mini-Staged-v0", "ppo", {}),
        "three, each with the tokens": ("SD/Classification-Mini-Staged-v0", "ppo", {"observation": "tokens"}),
        "every layer": ("SD/Classification-Mini-Layerwise-v0", "ppo", {}),
    },
    "input": {
        "one decision for all inputs": (MINI, "blind-ppo", {}),
        "a decision for each input": (MINI, "ppo", {}),
    },
    "granularity": {
        "one mask, sublayers": (MINI, "static", {}),
        "one mask, whole layers": (MINI, "static", {"per": "layer"}),
        "a decision for each input, sublayers": (MINI, "imitation", {}),
        "a decision for each input, whole layers": (MINI, "imitation", {"per": "layer"}),
    },
    "start": {
        "even odds": (MINI, "ppo", {}),
        "near dense (0.1)": (MINI, "ppo", {"initial_skip_rate": 0.1}),
    },
    "tokens": {
        "none dropped": (SUMMARIES, "reinforce", {}),
        "two levels (0, 50%)": (SUMMARIES, "reinforce", {"token_shares": [0.0, 0.5]}),
        "three levels (0, 25, 50%)": (SUMMARIES, "reinforce", {"token_shares": SHARES}),
        "five levels (0 to 60%)": (SUMMARIES, "reinforce", {"token_shares": [0.0, 0.15, 0.3, 0.45, 0.6]}),
    },
}


def folder_of(output: Path, row: Row, steps: int, seed: int) -> Path:
    """Of one run; rows that are the same share it."""
    env, algo, settings = row
    known = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return output / f"{env.removeprefix('SD/').removesuffix('-v0')}-{algo}-{known}-{steps}-{seed}"


def main() -> None:
    """Train what is not trained yet, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=list(ABLATIONS))
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    parser.add_argument("--env", default=MINI, help="instead of the Mini classifier, for objective and start")
    arguments = parser.parse_args()
    rows, steps = ABLATIONS[arguments.ablation], arguments.steps
    if arguments.env != MINI:
        if any(env != MINI for env, _, _ in rows.values()):
            parser.error(f"{arguments.ablation} has rows on other envs than {MINI}; leave --env out")
        rows = {name: (arguments.env, algo, settings) for name, (_, algo, settings) in rows.items()}
    if not arguments.table:
        runs = [
            Planned(env, algo, folder_of(arguments.output, (env, algo, settings), steps, seed), steps, seed, settings)
            for seed in arguments.seeds
            for env, algo, settings in rows.values()
        ]
        train_many(runs, jobs=arguments.jobs, imports=[__file__], on_word=show)
    shown = []
    for name, row in rows.items():
        folders = [folder_of(arguments.output, row, steps, seed) for seed in arguments.seeds]
        results = [read_result(folder) for folder in folders if (folder / "result.json").exists()]
        if results:
            kept = f"{sum(result['quality_kept'] for result in results)} of {len(results)}"
            learned = cell([result["last_policy"] for result in results])
            shown.append([row[0], f"{steps:,}", name, str(len(results)), learned, cell(results), kept])
    print(markdown(["env", "decisions", arguments.ablation, *COLUMNS[3:]], shown))


if __name__ == "__main__":
    main()
