"""A trained policy in a program of your own: first on texts, then inside the Hugging Face model.

sd-gym train SD/Classification-Mini-v0 --output runs/reviews
python examples/attached.py runs/reviews "classify : the window seemed boring ." "classify : the tour was hardly good ."
"""

import sys

import sd_gym


def main(run: str, texts: list[str]) -> None:
    loaded = sd_gym.load(run)  # the policy and its backbone; no env, no data set
    for text, answer in zip(texts, loaded(texts), strict=True):
        print(f"{answer.answer}: {answer.flops_ratio:.0%} of the FLOPs, {answer.skip.sum()} skipped: {text}")

    model, tokenizer = loaded.model, loaded.tokenizer  # plain transformers from here on
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    if model.can_generate():
        inputs.pop("token_type_ids", None)
        model.generate(**inputs, max_new_tokens=20)  # decides on the prompt, once a text
    else:
        model(**inputs)
    print("inside the model:", [f"{ratio:.0%}" for ratio in model.decisions.flops_ratio])
    sd_gym.detach(model)  # exactly the model that it was


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
