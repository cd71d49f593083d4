"""Tunes the bundled backbone under a policy of each of its three tasks: the last leg of its training (see its card).

    python benchmarks/tune_bundled.py --runs RUN RUN RUN --output mini

Each run is one of the agents on a Mini env; ``sd-gym prepare --policy`` does the same with the fixed data of one env,
while here all three tasks are trained on at once, from an endless stream of training instances.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sd_gym.agents.experiment.run import load_run
from torch import Tensor
from train_mini import encode, exact_match, make_tokenizer
from transformers import MBartForConditionalGeneration

from sd_gym.backbones.load import BUNDLED, save_backbone
from sd_gym.backbones.prepare import Recipe, freeze_observation, prepare
from sd_gym.policy.observation import observed
from sd_gym.switch import Switchboard
from sd_gym.tasks.procedural.generate import TASKS, generate_split, stream

WEIGHTS = (0.2, 0.2, 0.3, 0.3)  # of the levels
TRACE = 0.15  # share of the questions that ask for everyone on the way
RANDOM_SHARE = 0.15  # of the rows
# An input's log-odds of skipping are shifted by CONTRAST times (share of the switches that its policy skips - AROUND):
# cheap inputs are tuned under a bolder policy, dear ones under a more cautious one, since what sets them apart is what
# a policy saves more than a mask.
CONTRAST, AROUND = 5.0, 0.8


def batches(
    board: Switchboard, runs: list[Path], shares: list[float], batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of all tasks, of similar length, with the log-odds of each row's own policy."""
    tokenizer, chosen = make_tokenizer(), random.Random(seed)
    policies = {core.config.task: (core, policy) for _, core, policy in map(load_run, runs)}
    if set(policies) != set(TASKS):
        raise ValueError(f"expected a run of each of {', '.join(TASKS)}, got {', '.join(policies)}")
    streams = {task: stream(task, "train", seed, weights=WEIGHTS, trace=TRACE) for task in TASKS}
    while True:
        tasks = chosen.choices(list(TASKS), shares, k=6 * batch_size)
        pool = sorted(((next(streams[task]), task) for task in tasks), key=lambda drawn: len(drawn[0].source.split()))
        chunks = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        chosen.shuffle(chunks)
        for chunk in chunks:
            batch = encode(tokenizer, [instance for instance, _ in chunk])
            seen = (
                observed(board, {name: value for name, value in batch.items() if name != "labels"})
                .float()
                .cpu()
                .numpy()
            )
            logits = torch.empty(len(chunk), len(board))
            for task, (core, policy) in policies.items():
                rows = [row for row, (_, own) in enumerate(chunk) if own == task]
                logits[rows] = torch.from_numpy(policy.skip_logits(core.observation.standardised(seen[rows])))
            skipped = logits.sigmoid().mean(dim=1, keepdim=True)
            yield {**batch, "skip_logits": logits + CONTRAST * (skipped - AROUND)}


def main() -> None:
    """Tune, evaluate and save; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs=3, required=True, help="a run folder of each Mini env")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the backbone to")
    parser.add_argument("--start", type=Path, default=BUNDLED["mini"], help="folder of the backbone to go on from")
    parser.add_argument(
        "--shares", type=float, nargs=3, default=[0.3, 0.35, 0.35], help=f"of the instances, of {', '.join(TASKS)}"
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    model = MBartForConditionalGeneration.from_pretrained(arguments.start, trust_remote_code=False)
    board = Switchboard(model)
    freeze_observation(board)
    validation = {task: generate_split(task, "validation", 600) for task in TASKS}
    started = time.time()

    def on_step(step: int, figures: dict[str, float]) -> None:
        if step % 500:
            return
        print(f"step {step} {time.time() - started:.0f} s loss {figures['loss']:.3f} {figures['distillation']:.3f}")
        for task in TASKS:
            by_level = [exact_match(board, tokenizer, validation[task], rate) for rate in (0.0, 0.8)]
            dense, skipped = (" ".join(f"{value:.3f}" for value in levels.values()) for levels in by_level)
            print(f"  {task:20} {dense}  under random decisions {skipped}", flush=True)
        save_backbone(model, tokenizer, arguments.output)

    recipe = Recipe(
        arguments.steps,
        arguments.learning_rate,
        max_rate=0.8,
        warmup_steps=100,
        random_share=RANDOM_SHARE,
        seed=arguments.seed,
    )
    drawn = batches(board, arguments.runs, arguments.shares, arguments.batch_size, arguments.seed)
    prepare(board, drawn, recipe, on_step=on_step)
    save_backbone(model, tokenizer, arguments.output)
    test = {task: exact_match(board, tokenizer, generate_split(task, "test", 2000)) for task in TASKS}
    (arguments.output / "quality.json").write_text(json.dumps(test, indent=2) + "\n")


if __name__ == "__main__":
    main()
