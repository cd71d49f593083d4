"""A policy inside a classifier such as MiniLM, used through a pipeline of transformers as ever.

sd-gym prepare --backbone MINILM --dataset questions --output minilm-questions
sd-gym train SD/Classification-Custom-v0 --set dataset=questions --set backbone=minilm-questions --output runs/questions
python examples/minilm.py runs/questions "Who wrote Hamlet ?" "How far is the moon from the earth ?"
"""

import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import sd_gym


def main(folder: str, texts: list[str]) -> None:
    policy = sd_gym.SkipPolicy.from_pretrained(folder)  # a few files: no data set, no env
    backbone = policy.card["backbone"]["name"]
    model = AutoModelForSequenceClassification.from_pretrained(backbone, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
    classify = pipeline("text-classification", model=sd_gym.attach(model, policy, tokenizer), tokenizer=tokenizer)
    for text in texts:
        [answer] = classify([text])  # the model has decided what this text needs, and ran nothing else
        print(f"{answer['label']}, {model.decisions.flops_ratio[0]:.0%} of the FLOPs: {text}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
