"""Train a policy, then use it on texts and inside its Hugging Face model. It takes minutes and downloads nothing.

python examples/train_and_attach.py
"""

import sd_gym


def main(env_id="SD/Classification-Mini-v0", algo="reinforce", steps=20_000, output="runs/attached", **settings):
    """Returns the result of the test split."""
    result = sd_gym.train(env_id, algo, output, steps=steps, **settings)
    print(result["guarantee"])

    texts = [instance["text"] for instance in sd_gym.instances(env_id, "test")[:3]]
    loaded = sd_gym.load(output)  # the policy and its backbone; no env, no data set
    for text, answer in zip(texts, loaded(texts), strict=True):
        print(f"{answer.answer}: {answer.flops_ratio:.0%} of the FLOPs: {text}")

    model, tokenizer = loaded.model, loaded.tokenizer  # plain transformers from here on
    sd_gym.detach(model)  # exactly the model that it was
    sd_gym.attach(model, output, tokenizer)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    if model.can_generate():
        inputs.pop("token_type_ids", None)
        model.generate(**inputs, max_new_tokens=20)  # decides once per text, on the prompt
    else:
        model(**inputs)
    # Without the policy's own FLOPs, which the answers above include.
    print("inside the model:", [f"{ratio:.0%}" for ratio in model.decisions.flops_ratio])
    return result


if __name__ == "__main__":
    main()
