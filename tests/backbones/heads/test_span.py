"""Extractive question answering: spans of the context, from start and end logits."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sd_gym.backbones import Recipe
from sd_gym.backbones.heads import SpanHead
from sd_gym.backbones.heads.span import NOWHERE, best_spans, span_log_likelihood
from sd_gym.config import BackboneConfig, DataConfig, TokensConfig
from sd_gym.data.instance import Instance
from sd_gym.envs import ConfigError
from sd_gym.errors import DataError
from sd_gym.tasks.data import load_split
from sd_gym.tasks.encoding import encode
from sd_gym.tasks.metrics import normalised
from sd_gym.tasks.preparation import prepare_backbone
from tests.conftest import WORDS, make_extractor, make_model, save, varied
from tests.execution.conftest import random_decisions

ARCHITECTURES = ["bart", "mbart", "t5", "gpt2", "llama", "bert", "roberta", "distilbert", "electra"]


# --- spans ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(2, 9), longest=st.integers(1, 12), unanswerable=st.booleans())
def test_the_best_span_is_that_of_an_exhaustive_search(seed, length, longest, unanswerable):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(4, 2, length))).float()
    allowed = torch.from_numpy(random.random((4, length)) < 0.5)
    allowed[:, 0], allowed[:, -1] = unanswerable, True
    logits = logits.masked_fill(~allowed[:, None], NOWHERE)
    best = best_spans(logits, longest).tolist()
    for row in range(4):
        spans = [
            (first, last)
            for first in range(length)
            for last in range(first, min(length, first + longest))
            if allowed[row, first] and allowed[row, last] and (first > 0 or last == 0)
        ]
        assert tuple(best[row]) == max(spans, key=lambda span: logits[row, 0, span[0]] + logits[row, 1, span[1]])


def test_likelihood_adds_the_probabilities_of_the_right_spans():
    start, end = [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]
    logits = torch.tensor([[start, end]] * 3).log() + 7  # a constant changes nothing
    spans = torch.tensor([[[1, 2], [0, 0]], [[1, 1], [-100, -100]], [[-100, -100], [-100, -100]]])
    assert SpanHead().likelihood(logits, spans).tolist() == pytest.approx([0.6 * 0.5 + 0.1 * 0.2, 0.6 * 0.3, 0.0])
    assert SpanHead().loss(logits, spans).item() == pytest.approx(-(np.log(0.32) + np.log(0.18)) / 2, rel=1e-5)
    assert (
        SpanHead().loss(logits, spans[2:].expand(3, -1, -1)).item() == 0.0
    )  # nothing to learn from: no loss, and no NaN
    assert span_log_likelihood(logits, spans)[2] == -torch.inf


def test_distillation_of_spans_compares_what_both_may_choose():
    dense = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]]).log()
    labels = torch.tensor([[[1, 1]]])
    assert SpanHead().distillation(dense, dense, labels).item() == pytest.approx(0, abs=1e-6)
    switched = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]]).log().clamp(min=NOWHERE)
    # Without the third token the dense output is (2/3, 1/3) and (1/3, 2/3).
    expected = 2 * (2 / 3 * np.log(2 / 3 / 0.5) + 1 / 3 * np.log(1 / 3 / 0.5))
    switched.requires_grad_()
    loss = SpanHead().distillation(switched, dense, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert torch.isfinite(switched.grad).all()


# --- data and encoding ------------------------------------------------------------------------------------------------


def question(context, answers, starts=None, number=0):
    spans = tuple((start, start + len(text)) for start, text in zip(starts or [], answers, strict=starts is not None))
    first, *others = answers or [""]
    return Instance(f"q-{number}", "was the room", first, 0, context, ((0, 12),), tuple(others), spans)


def encoded(instances, tokenizer, limit=32, unanswerable=True):
    backbone = BackboneConfig(name="tiny", max_source_length=limit, max_target_length=8)
    return encode(instances, tokenizer, SpanHead(), backbone, unanswerable=unanswerable)


def test_two_answers_of_the_same_tokens_are_one_span(tiny_tokenizer):
    (labels,) = encoded([question("the room was good", ["good", "goo"], [13, 13])], tiny_tokenizer).labels
    assert len({*map(tuple, labels.tolist())} - {(-100, -100)}) == 1
    assert (labels[1:] == -100).all()


@settings(deadline=None)
@given(data=st.data())
def test_the_label_is_the_answer_and_the_span_is_its_original_text(data, tiny_tokenizer):
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
    gaps = data.draw(st.lists(st.sampled_from([" ", "  ", "\n "]), min_size=len(words), max_size=len(words)))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    pieces = [word + gap for word, gap in zip(words, gaps, strict=True)]
    context, start = "".join(pieces), len("".join(pieces[:first]))
    answer = "".join(pieces[first : last + 1]).strip()
    asked = [question(context, [answer], [start])]
    split = encoded(asked, tiny_tokenizer)
    before = 1 + 3 + 1  # [CLS], the question, [SEP]
    assert split.labels.tolist() == [[[before + first, before + last]]]
    assert SpanHead().to_texts(asked, split, np.array([0]), split.labels[:, 0].numpy()) == [answer]
    assert split.context_mask[0].tolist() == [True] + [False] * 4 + [True] * len(words) + [False]


def test_answers_without_a_place_are_looked_for(tiny_tokenizer):
    context = "the food was good the food"
    split = encoded([question(context, ["the food", "good"])], tiny_tokenizer)
    assert split.labels.tolist() == [[[5, 6], [9, 10], [8, 8]]]
    wrong = encoded([question(context, ["good"], [3])], tiny_tokenizer)  # not at its place: wherever it occurs
    assert wrong.labels.tolist() == [[[8, 8]]]
    with pytest.raises(DataError, match="the answer 'awful' is not in its context"):
        encoded([question(context, ["awful"])], tiny_tokenizer)


def test_only_the_context_is_cut_and_answers_that_were_cut_off_are_counted(tiny_tokenizer):
    contexts = ["good food was fine", "fine was the food good", "good"]
    instances = [question(context, ["good"], [context.index("good")]) for context in contexts]
    instances.append(question("the food was bad", []))
    split = encoded(instances, tiny_tokenizer, limit=9)  # 5 before the context, 1 after it
    assert split.source_length.tolist() == [9, 9, 7, 9]
    assert split.labels.tolist() == [[[5, 5]], [[-100, -100]], [[5, 5]], [[0, 0]]]
    assert split.counts == {"instances": 4, "cut_inputs": 3, "cut_targets": 1}
    assert not encoded(instances[:3], tiny_tokenizer, unanswerable=False).context_mask[:, 0].any()
    with pytest.raises(DataError, match="instance q-0: the question alone has 6 of max_source_length 6 tokens"):
        encoded(instances, tiny_tokenizer, limit=6)


def test_an_answer_cut_in_two_is_cut_off(tiny_tokenizer):
    split = encoded([question("the food was bad", ["food was bad"], [4])], tiny_tokenizer, limit=9)
    assert split.labels.tolist() == [[[-100, -100]]]
    assert split.target_cut.all()


def test_a_context_without_tokens_has_no_answer(tiny_tokenizer):
    assert encoded([question("   ", [" "], [0])], tiny_tokenizer).target_cut.all()


@pytest.mark.parametrize(("context", "limit"), [("the food was bad  ", 99), ("the food  was bad", 8)])
def test_the_end_of_an_answer_may_have_no_token(context, limit, tiny_tokenizer):
    answer = context[4:] if limit == 99 else "food "
    split = encoded([question(context, [answer], [4])], tiny_tokenizer, limit=limit)
    assert split.labels.tolist() == [[[6, 8 if limit == 99 else 6]]]
    assert not split.target_cut.any()


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["good"], "answer_start": []},
        {"text": ["good"], "answer_start": [-1]},
        {"text": ["good"], "answer_start": ["0"]},
    ],
)
def test_malformed_places_are_refused(tmp_path, answers):
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "q", "context": "good", "answers": answers}))
    with pytest.raises(DataError, match="line 1: answer_start must have one character index per answer"):
        load_split(str(tmp_path / "qa.jsonl"), "question_answering", "train")


# --- envs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The answer is the word after "was"; every fourth question has no answer."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 60), ("validation", 24), ("test", 24)):
        rows = []
        for number in range(size):
            words = random.choice(["the", "food", "not", "room"], random.integers(4, 9)).tolist()
            place, answer = int(random.integers(1, len(words))), str(random.choice(["good", "bad", "fine", "awful"]))
            answered = number % 4 > 0
            if answered:
                words[place - 1 : place + 1] = ["was", answer]
            context = " ".join(words)
            start = [len(" ".join(words[:place])) + 1] if answered else []
            answers = {"text": [answer] if answered else [], "answer_start": start}
            rows.append({"question": "the food", "context": context, "answers": answers})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(params=ARCHITECTURES)
def extractor(request, tmp_path, tiny_tokenizer):
    return str(save(make_extractor(request.param), tiny_tokenizer, tmp_path / request.param))


def make(data, backbone, **settings):
    settings = {"max_source_length": 20, "max_target_length": 3, "metric": "squad", "quality": "metric", **settings}
    return gym.make("SD/QuestionAnswering-Custom-v0", dataset=data, backbone=backbone, **settings)


def test_the_env_passes_the_checks_and_each_row_answers_as_alone(data, extractor):
    env = make(data, extractor, token_shares=[0.0, 0.5], token_ranking="position")
    check_env(env.unwrapped)
    core = env.unwrapped.core
    split, rows = core.split("test"), np.arange(24)
    decisions = random_decisions(core, 24, 0.3)
    probable = make(data, extractor, token_shares=[0.0, 0.5], token_ranking="position", quality="likelihood")
    run = probable.unwrapped.core.split("test").scoring.run
    alone = [run(rows[i : i + 1], decisions[i : i + 1])[0] for i in rows]
    np.testing.assert_allclose(run(rows, decisions), alone, rtol=1e-4, atol=1e-6)
    together = split.passes.answers(rows, decisions)
    assert len(set(together)) > 3
    kept_end = np.where(decisions[:, -1] > 0, 0.5, 1.0)
    for text, instance, share in zip(together, split.instances, kept_end, strict=True):
        assert text in instance.source_pair
        # The context's last tokens were dropped, so no answer ends there.
        words = instance.source_pair.split()
        assert text in " ".join(words[: int(np.ceil(share * len(words)))])
    assert set(split.scoring.metrics(rows, decisions)) == {"exact_match", "f1"}
    exact = make(data, extractor, quality="exact_match", metric="exact_match").unwrapped.core.split("test")
    nothing = np.zeros((24, len(core.nvec)), dtype=np.int64)
    texts = exact.passes.answers(rows, nothing)
    matches = [
        normalised(text) in map(normalised, one.references or ("",))
        for text, one in zip(texts, exact.instances, strict=True)
    ]
    assert exact.scoring.run(rows, nothing).tolist() == [float(match) for match in matches]


@pytest.mark.parametrize("quality", ["metric", "exact_match", "likelihood"])
def test_quality_comes_with_the_likelihood_from_the_same_passes(quality, data, tmp_path, tiny_tokenizer):
    model = make_extractor("bert")
    save(model, tiny_tokenizer, tmp_path)
    core = make(data, str(tmp_path), quality=quality).unwrapped.core
    split, rows, decisions = core.split("test"), np.arange(24), random_decisions(core, 24, 0.3)
    passes = []
    core.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    expected = split.scoring.run(rows, decisions)
    alone = len(passes)
    quality, probability = split.scoring.quality_and_likelihood(rows, decisions)
    assert len(passes) - alone <= alone
    np.testing.assert_array_equal(quality, expected)
    likely = make(data, str(tmp_path), quality="likelihood").unwrapped.core.split("test")
    np.testing.assert_array_equal(probability, likely.scoring.quality_and_likelihood(rows, decisions)[1])


@pytest.mark.parametrize("quality", ["metric", "exact_match"])
def test_masks_that_agree_up_to_a_layer_share_the_pass_up_to_there(quality, data, tmp_path, tiny_tokenizer):
    save(make_extractor("bert"), tiny_tokenizer, tmp_path)
    core = make(data, str(tmp_path), quality=quality).unwrapped.core
    split, rows = core.split("test"), np.arange(24)
    masks = np.zeros((3, len(core.nvec)), dtype=np.int64)
    masks[1, -2] = masks[2, -3] = 1  # in the last layer alone
    first = []
    early = core.backbone.model.base_model.encoder.layer[0].attention.self.query
    early.register_forward_hook(lambda *_: first.append(1))
    under_all = split.scoring.under_all(rows, masks)
    assert len(first) == 1
    alone = [split.scoring.quality_and_likelihood(rows, np.tile(mask, (24, 1))) for mask in masks]
    for values, expected in zip(under_all, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(values, np.stack(expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize("quality", ["metric", "exact_match", "likelihood"])
def test_what_is_extracted_goes_on_from_the_last_look(quality, data, extractor):
    settings = {"quality": quality, "stages": ["first", "middle"], "token_shares": [0.0, 0.5]}
    core = make(data, extractor, **settings, token_ranking="position").unwrapped.core
    split, rows, decisions = core.split("test"), np.arange(24), random_decisions(core, 24, 0.3)
    _, state = core.rollout(split, rows, lambda observations: decisions)
    split.scoring.run(rows, 0 * decisions)  # so that a dense likelihood is known
    with FlopCounterMode(display=False) as whole:
        expected = split.scoring.run(rows, decisions)
    with FlopCounterMode(display=False) as rest:
        quality = split.scoring.run(rows, decisions, state)
    np.testing.assert_allclose(quality, expected, rtol=1e-4, atol=1e-6)
    assert rest.get_total_flops() < 0.9 * whole.get_total_flops()


def test_likelihood_is_that_of_the_untouched_model(data, tmp_path, tiny_tokenizer):
    model = make_extractor("bert")
    save(model, tiny_tokenizer, tmp_path)
    split = make(data, str(tmp_path), quality="likelihood").unwrapped.core.split("test")
    _, probability = split.scoring.quality_and_likelihood(np.arange(24), np.zeros((24, 7), dtype=np.int64))
    for row, instance in enumerate(split.instances[:6]):
        inputs = tiny_tokenizer(instance.source, instance.source_pair, return_tensors="pt")
        with torch.inference_mode():
            output = model(**inputs)
        allowed = [place for place, number in enumerate(inputs.sequence_ids(0)) if number == 1 or place == 0]
        word = (["[CLS]"] if not instance.references else list(instance.references))[0]
        place = allowed.index(inputs.tokens(0).index(word))
        expected = output.start_logits[0, allowed].softmax(-1)[place] * output.end_logits[0, allowed].softmax(-1)[place]
        assert probability[row] == pytest.approx(float(expected), rel=1e-4)


def test_analytic_flops_are_counted_flops(data, extractor):
    core = make(data, extractor, token_shares=[0.0, 0.5]).unwrapped.core
    core.backbone.model.set_attn_implementation("eager")  # the only one whose products the counter sees on a CPU
    split, decisions = core.split("train"), random_decisions(core, 2, 0.3)
    decisions[:, -1] = [0, 1]
    for row in range(2):
        split.tokens.scores, split.tokens.droppable  # noqa: B018  (ranking is not part of the pass)
        with FlopCounterMode(display=False) as counter:
            split.scoring.run(np.array([row]), decisions[row : row + 1])
        assert counter.get_total_flops() == split.costs.flops(np.array([row]), decisions[row : row + 1])[0]


def test_a_backbone_of_the_wrong_kind_is_refused(data, tmp_path, tiny_tokenizer, tiny_backbone):
    for name, model in (("generator", make_model("bart")), ("extractor", make_extractor("bert"))):
        save(model, tiny_tokenizer, tmp_path / name)
    with pytest.raises(ConfigError, match="gives a label, but question_answering needs a text or a span"):
        make(data, str(tiny_backbone))
    with pytest.raises(
        ConfigError, match=r"'backbone.answers': 'extracted' needs a backbone whose answers are extracted"
    ):
        make(data, str(tmp_path / "generator"), answers="extracted")
    with pytest.raises(
        ConfigError, match=r"'backbone.answers': 'generated' needs a backbone whose answers are generated"
    ):
        make(data, str(tmp_path / "extractor"), answers="generated")
    (tmp_path / "x.jsonl").write_text(varied({"document": "the food", "summary": "food"}, "document"))
    with pytest.raises(ConfigError, match="gives a span, but summarization needs a text"):
        gym.make("SD/Summarization-Custom-v0", dataset=str(tmp_path / "x.jsonl"), backbone=str(tmp_path / "extractor"))


# --- preparing --------------------------------------------------------------------------------------------------------


def test_a_bare_encoder_learns_to_extract_and_is_robust_to_skipping_and_dropping(data, tmp_path, tiny_tokenizer):
    save(make_model("bert").bert, tiny_tokenizer, tmp_path / "bare")
    report = prepare_backbone(
        BackboneConfig(name=str(tmp_path / "bare"), max_source_length=20, max_target_length=3),
        DataConfig(dataset=data),
        "question_answering",
        tmp_path / "out",
        Recipe(250, 0.01),
        tokens=TokensConfig(shares=(0.0, 0.3)),
    )
    after, before = report["quality"]["after"], report["quality"]["before"]
    assert report["measure"] == "f1"
    assert after["0.0"] > 0.8 > before["0.0"]
    assert after["0.2"] > before["0.2"]
    assert set(report["quality_by_token_share"]["after"]) == {"0.3"}
    core = make(data, str(tmp_path / "out")).unwrapped.core
    split = core.split("test")
    quality = split.scoring.run(np.arange(24), np.zeros((24, len(core.nvec)), dtype=np.int64))
    assert quality.mean() == pytest.approx(after["0.0"])


def test_a_generator_can_be_made_to_extract(data, tmp_path, tiny_tokenizer):
    make_model("bart").save_pretrained(tmp_path / "generator")
    make_model("pegasus").save_pretrained(tmp_path / "pegasus")
    for name in ("generator", "pegasus"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
    source = DataConfig(dataset=data), "question_answering"
    generator, pegasus = (
        BackboneConfig(name=str(tmp_path / name), max_source_length=20) for name in ("generator", "pegasus")
    )
    report = prepare_backbone(generator, *source, tmp_path / "a", Recipe(1))
    assert report["measure"] == "likelihood"
    extracting = {"answers": "extracted"}
    report = prepare_backbone(generator.model_copy(update=extracting), *source, tmp_path / "b", Recipe(1))
    assert report["measure"] == "f1"
    with pytest.raises(ValueError, match="'pegasus' has no head that extracts answers"):
        prepare_backbone(pegasus.model_copy(update=extracting), *source, tmp_path / "c", Recipe(1))
