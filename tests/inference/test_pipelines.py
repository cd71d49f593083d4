"""``transformers.pipeline`` around an attached model decides as a direct call does, whatever it is asked for."""

import copy
import threading

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

import sd_gym
from tests.conftest import DECODER, ENCODER, make_model
from tests.inference.conftest import make_policy

TEXTS = ["good food", "the room was awful", "not bad", "the food was not good the room was fine", "bad"]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """One that pads at the left, as decoder-only models need it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def decoder(name):
    """A model with the special tokens of the tokenizer."""
    model = make_model(name)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = 0, 2
    return model


def alone(model, tokenizer, text, **settings):
    """A direct call on one text, and what it decided."""
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        result = model.generate(**inputs, **settings) if settings else model(**inputs).logits
    return result[0], model.decisions.skip[0]


@pytest.mark.parametrize("name", ENCODER)
def test_text_classification(name, tiny_tokenizer):
    model, tokenizer = make_model(name), tiny_tokenizer
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    sd_gym.attach(model, make_policy(model, seed=2))
    wanted, skip = zip(*(alone(model, tokenizer, text) for text in TEXTS), strict=True)
    assert len(np.unique(skip, axis=0)) > 1
    scores = torch.stack(wanted).softmax(dim=1).max(dim=1)
    one_by_one, batched = classify(TEXTS), classify(TEXTS, batch_size=5)
    np.testing.assert_array_equal(model.decisions.skip, skip)
    for came in (one_by_one, batched, list(classify(text for text in TEXTS))):
        assert [one["label"] for one in came] == [f"LABEL_{label}" for label in scores.indices]
        np.testing.assert_allclose([one["score"] for one in came], scores.values, atol=1e-5)


def test_zero_shot_classification(tiny_tokenizer):
    model = make_model("bert")
    model.config.label2id = {"entailment": 0, "contradiction": 1}
    classify = pipeline("zero-shot-classification", model=model, tokenizer=tiny_tokenizer)
    sd_gym.attach(model, make_policy(model, seed=2))
    came = classify(TEXTS[1], ["good", "bad", "fine"], hypothesis_template="the food was {}")
    assert sorted(came["labels"]) == ["bad", "fine", "good"]
    skip = model.decisions.skip
    assert skip.any()
    with torch.inference_mode():
        model(**tiny_tokenizer(TEXTS[1], "the food was fine", return_tensors="pt"))
    np.testing.assert_array_equal(model.decisions.skip, skip)


@pytest.mark.parametrize("name", DECODER)
def test_text_generation(name, tokenizer):
    model = decoder(name)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    sd_gym.attach(model, make_policy(model, seed=2))
    settings = {"max_new_tokens": 4, "do_sample": False}
    wanted, skip = zip(*(alone(model, tokenizer, text, **settings) for text in TEXTS), strict=True)
    assert len(np.unique(skip, axis=0)) > 1
    for batch_size in (1, 5):
        came = write(TEXTS, batch_size=batch_size, return_tensors=True, **settings)
        for one, ids in zip(came, wanted, strict=True):
            assert [token for token in one[0]["generated_token_ids"] if token] == ids[ids != 0].tolist()  # 0 pads
    np.testing.assert_array_equal(model.decisions.skip, skip)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "num_return_sequences": 1},
    ],
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_text_generation_with_several_answers(settings, batch_size, tokenizer):
    model = decoder("llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    sd_gym.attach(model, make_policy(model, seed=2))
    skip = [alone(model, tokenizer, text, max_new_tokens=1)[1] for text in TEXTS]
    came = write(TEXTS, batch_size=batch_size, max_new_tokens=3, **settings)
    assert [len(one) for one in came] == [settings["num_return_sequences"]] * 5
    np.testing.assert_array_equal(model.decisions.skip, skip[-batch_size:])


def test_text_generation_streams(tokenizer):
    model = decoder("llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    sd_gym.attach(model, make_policy(model, seed=2))
    settings = {"max_new_tokens": 4, "do_sample": False}
    wanted = write(TEXTS[1], return_full_text=False, **settings)[0]["generated_text"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=20)
    thread = threading.Thread(target=write, args=(TEXTS[1],), kwargs={**settings, "streamer": streamer})
    thread.start()
    assert "".join(streamer).split() == wanted.split()
    thread.join()
