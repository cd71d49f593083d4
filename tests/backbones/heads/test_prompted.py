"""Decoder-only backbones as envs: prompted, padded at the left, scored on their answers after the prompt."""

import json
import shutil
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from sd_gym.backbones import Recipe
from sd_gym.backbones.heads.prompted import PromptedHead
from sd_gym.config import BackboneConfig, DataConfig, TokensConfig
from sd_gym.data.instance import Instance
from sd_gym.envs import ConfigError
from sd_gym.errors import DataError
from sd_gym.tasks.encoding import encode
from sd_gym.tasks.preparation import prepare_backbone
from tests.conftest import WORDS, make_model
from tests.execution.conftest import random_decisions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation", "test"):
        rows = [
            {
                "question": " ".join(random.choice(WORDS, 3)),
                "context": " ".join(random.choice(WORDS, random.integers(3, 9))),
                "answers": [" ".join(random.choice(WORDS, random.integers(1, 3)))],
            }
            for _ in range(12)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma3_text"])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    words = ["<unk>", "<pad>", "<s>", "</s>", *WORDS, "Question", "Answer", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # no padding token, as SmolLM2 has none
    make_model(request.param, "eager").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=60, **special).save_pretrained(folder)
    return str(folder)


def make(data, backbone, **settings):
    settings = {"max_source_length": 30, "max_target_length": 4, **settings}
    return gym.make("SD/QuestionAnswering-Custom-v0", dataset=data, backbone=backbone, **settings)


@pytest.mark.parametrize("settings", [{"quality": "likelihood"}, {"quality": "metric", "metric": "squad"}])
def test_the_env_passes_the_checks_and_scores_each_row_as_alone(data, backbone, settings):
    env = make(data, backbone, token_shares=[0.0, 0.5], **settings)
    check_env(env.unwrapped)
    core = env.unwrapped.core
    split, rows = core.split("test"), np.arange(12)
    decisions = random_decisions(core, 12, 0.3)
    together = split.scoring.run(rows, decisions)
    alone = [split.scoring.run(rows[i : i + 1], decisions[i : i + 1])[0] for i in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    assert (split.costs.flops_ratio(rows, 0 * decisions) == 1).all()


def test_likelihood_is_that_of_the_model_relative_to_the_untouched_one(data, backbone):
    core = make(data, backbone, quality="likelihood").unwrapped.core
    split, decisions = core.split("test"), random_decisions(core, 12, 0.3)
    quality, reference = split.scoring.quality(np.arange(12), decisions)
    np.testing.assert_array_equal(reference, 1.0)
    assert (quality != 1.0).any()
    for row in (0, 5):
        instance = split.instances[row]
        prompt = f"{instance.source_pair}\nQuestion: {instance.source}\nAnswer:"
        ids = core.backbone.tokenizer(prompt).input_ids
        answer = [*core.backbone.tokenizer(instance.target).input_ids, core.backbone.tokenizer.eos_token_id]
        losses = []
        for decision in (decisions[row], 0 * decisions[row]):
            with core.backbone.board.decide(decision[None, :-1]), torch.inference_mode():
                logits = core.backbone.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            losses.append(-float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()))
        assert split.dense_loss[row] == pytest.approx(losses[1], rel=1e-4)
        assert quality[row] == pytest.approx(np.clip(1 + losses[1] - losses[0], 0, 2), abs=1e-4)


def test_each_mask_of_many_says_what_it_says_alone(data, backbone):
    core = make(data, backbone, quality="metric", metric="squad", token_shares=[0.0, 0.5]).unwrapped.core
    passes, rows, masks = core.split("test").passes, np.arange(12), random_decisions(core, 5, 0.3)
    texts = passes.generated_under_all(rows, masks)
    assert texts == [passes.answers(rows, np.tile(mask, (12, 1))) for mask in masks]
    assert len({tuple(answers) for answers in texts}) > 1


def test_an_answer_ends_at_the_stop(data, backbone):
    settings = {"quality": "metric", "metric": "squad", "max_target_length": 8}
    whole, rows = make(data, backbone, **settings).unwrapped.core, np.arange(12)
    dense = np.zeros((12, len(whole.nvec)), dtype=np.int64)
    texts = whole.split("test").passes.answers(rows, dense)
    stop = " " + max(texts, key=lambda text: len(set(text.split()))).split()[-1]
    core = make(data, backbone, stop=stop, **settings).unwrapped.core
    ended = core.split("test").passes.answers(rows, dense)
    assert ended != texts
    assert ended == [text.partition(stop)[0].strip() for text in texts]
    for labels, instance in zip(core.split("test").encoded.labels, core.split("test").instances, strict=True):
        assert core.backbone.tokenizer.decode(labels[labels >= 0]) == f"{instance.target.partition(stop)[0]}{stop}"
    with pytest.raises(DataError, match="expected max_target_length above 1, the tokens of the stop, got 1"):
        make(data, backbone, stop=stop, max_target_length=1)


def test_a_prompt_is_decided_on_in_its_pass_as_before_it(data, backbone):
    core = make(data, backbone, token_shares=[0.0, 0.5]).unwrapped.core
    split, recorded = core.split("train"), []

    def decide(observations):
        recorded.append(observations)
        return random_decisions(core, 1, 0.3)

    with torch.inference_mode():
        for row in range(6):
            rows = np.array([row])
            ((_, logits, _),) = core.decided_logits(split, rows, decide)
            ((_, expected, _),) = split.passes.logits(rows, decide(core.observe(split, rows)))
            assert torch.equal(logits, expected)
            np.testing.assert_allclose(recorded[-2], recorded[-1], rtol=1e-4, atol=1e-4)


def test_analytic_flops_are_counted_flops(data, backbone):
    core = make(data, backbone, token_shares=[0.0, 0.5]).unwrapped.core
    core.backbone.model.set_attn_implementation("eager")  # the only one whose products the counter sees on a CPU
    split = core.split("train")
    decisions = random_decisions(core, 2, 0.3)
    decisions[:, -1] = [0, 1]
    for row in range(2):
        with FlopCounterMode(display=False) as counter:
            split.scoring.run(np.array([row]), decisions[row : row + 1])
        assert counter.get_total_flops() == split.costs.flops(np.array([row]), decisions[row : row + 1])[0]


def test_only_the_context_loses_tokens_and_only_the_context_is_cut(data, backbone):
    core = make(data, backbone, token_shares=[0.0, 0.9], max_source_length=13, token_ranking="random").unwrapped.core
    split = core.split("test")
    tokenizer = core.backbone.tokenizer
    for row in range(12):
        ids = split.encoded.input_ids[row, : split.encoded.source_length[row]]
        assert len(ids) <= 13
        question = f"Question : {split.instances[row].source} Answer :"
        assert tokenizer.decode(ids).endswith(question)
        kept = ids[torch.from_numpy(~split.tokens.droppable[row, : len(ids)])]
        assert tokenizer.decode(kept) == question
    with pytest.raises(DataError, match="the prompt alone has 7 of max_source_length 7 tokens"):
        make(data, backbone, max_source_length=7)
    with pytest.raises(DataError, match="the prompt must name"):
        make(data, backbone, prompt="Say it:")
    alone = replace(split.instances[1], source_pair=None, origin="input 1")
    with pytest.raises(DataError, match=r"input 1 .*: the prompt names {source_pair}, and there is only one text"):
        encode([split.instances[0], alone], tokenizer, core.backbone.head, split.reading)
    with pytest.raises(ConfigError, match="decoder-only, so it needs a 'prompt'"):
        make(data, backbone, prompt=None)


def test_preparing_teaches_the_answer_after_the_prompt(backbone, tmp_path):
    rows = [{"document": f"the {w} was {x}", "summary": f"{x} {w}"} for w in ("food", "room") for x in ("good", "bad")]
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    source = DataConfig(dataset=str(tmp_path / "reports.jsonl"), overlap="allow")
    decoder = BackboneConfig(name=backbone, max_target_length=4)
    settings = {"recipe": Recipe(120, 0.01), "tokens": TokensConfig(shares=(0.0, 0.3)), "rows": 1.0}
    with pytest.raises(ValueError, match="decoder-only, so it needs a 'prompt'"):
        prepare_backbone(decoder, source, "summarization", tmp_path / "out", **settings)
    prompted = decoder.model_copy(update={"prompt": "Question: {source} Answer:"})
    report = prepare_backbone(prompted, source, "summarization", tmp_path / "out", **settings)
    before, after = (report["quality"][when] for when in ("before", "after"))
    assert after["0.0"] > 0.9 > before["0.0"]
    assert after["0.2"] > before["0.2"]
    env = gym.make(
        "SD/Summarization-Custom-v0",
        dataset=source.dataset,
        overlap="allow",
        policy_rows="all",
        backbone=str(tmp_path / "out"),
        prompt="Question: {source} Answer:",
        max_target_length=4,
        metric="rouge",
        quality="metric",
    )
    core = env.unwrapped.core
    split = core.split("test")
    assert split.scoring.run(np.arange(4), np.zeros((4, len(core.nvec)), dtype=np.int64)).mean() > 0.9


def test_the_loss_is_on_the_answer_alone(data, backbone):

    core = make(data, backbone).unwrapped.core
    split = core.split("train")
    inputs = split.passes.inputs(np.arange(5))
    with torch.inference_mode():
        loss = core.backbone.head.loss(core.backbone.logits(inputs), inputs["labels"])
        # Hugging Face's loss: labels of the whole sequence, -100 at the prompt and at the padding.
        ids = torch.cat([inputs["input_ids"], inputs["labels"].clamp(min=0)], dim=1)
        mask = torch.cat([inputs["attention_mask"], (inputs["labels"] >= 0).long()], dim=1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), inputs["labels"]], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        model = core.backbone.model
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "got"),
    [
        ('{"a": 1} {source} {source_pair}', "got '\"a\"'"),
        ("{source} {source_pair} {x}", "got 'x'"),
        ("{source!r} {source_pair}", "got 'source'"),
        ("{source} {source_pair} {source_pair}", "got 'source_pair'"),
        ("{source} {source_pair} {", "expected '}'|Single '{'"),
    ],
)
def test_other_braces_in_a_prompt_are_written_twice(data, backbone, prompt, got):
    with pytest.raises(ConfigError, match=rf"config key 'backbone.prompt': ({got}).*; expected \{{source\}}"):
        make(data, backbone, prompt=prompt)
    make(data, backbone, prompt='{{"a": 1}} {source} {source_pair}')


def test_without_an_end_of_texts_there_has_to_be_a_stop(data, backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "endless")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    tokenizer.eos_token, tokenizer.pad_token = None, "<pad>"
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(DataError, match="no token that ends a text; set 'stop'"):
        make(data, str(tmp_path / "endless"))
    env = make(data, str(tmp_path / "endless"), stop=":", quality="metric", metric="squad")
    env.reset(seed=0)
    env.step(env.action_space.sample())  # which generates


def test_a_text_is_judged_and_counted_up_to_its_stop(data, backbone):
    settings = {"quality": "metric", "metric": "squad", "max_target_length": 8}
    rows, models = np.arange(12), make(data, backbone, **settings).unwrapped.core
    dense = np.zeros((12, len(models.nvec)), dtype=np.int64)
    passes = models.split("test").passes
    texts, _ = passes.answers_and_judgement(rows, dense)
    stop = " " + " ".join(max(texts, key=lambda text: len(set(text.split()))).split()[1:3])  # of two tokens
    stopped = make(data, backbone, stop=stop, **settings).unwrapped.core.split("test").passes
    steps, wrapped = [], models.backbone.model.register_forward_hook(lambda *_: steps.append(1))
    try:
        ended, judged = stopped.answers_and_judgement(rows, dense)
        all_steps, several = len(steps), next(row for row in rows if stopped.finished[row])
        steps.clear()
        alone = stopped.answers_and_judgement(rows[several : several + 1], dense[:1])
    finally:
        wrapped.remove()
    assert ended == [text.partition(stop)[0].strip() for text in texts]
    assert len(steps) == stopped.generated[several] < all_steps == 8
    assert alone[0] == [ended[several]]
    np.testing.assert_allclose(alone[1][0], judged[several], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.exp(judged[:, 2]), stopped.generated)
    decode, end = models.backbone.tokenizer.decode, models.backbone.tokenizer.eos_token_id
    for row in rows[stopped.finished]:
        tokens = stopped.written[row]
        assert (stop in decode(tokens, skip_special_tokens=True)) != (tokens[-1] == end)
        assert stop not in decode(tokens[:-1], skip_special_tokens=True)


def test_with_a_stop_the_tokenizers_end_and_the_stops_token_end_a_text(data, backbone, monkeypatch):
    settings = {"quality": "metric", "metric": "squad", "max_target_length": 8}
    core, rows = make(data, backbone, **settings).unwrapped.core, np.arange(12)
    dense, tokenizer = np.zeros((12, len(core.nvec)), dtype=np.int64), core.backbone.tokenizer
    monkeypatch.setattr(core.backbone.model.generation_config, "eos_token_id", None)
    stop = max(core.split("test").passes.answers(rows, dense), key=len).split()[-1]
    ends = {tokenizer.eos_token_id, *tokenizer(stop, add_special_tokens=False).input_ids}
    for beams in (1, 3):
        stopped = make(data, backbone, stop=stop, num_beams=beams, **settings).unwrapped.core.split("test").passes
        found = stopped.answers(rows, dense)
        for text, tokens, ended in zip(found, stopped.written, stopped.finished, strict=True):
            assert stop not in text
            assert ended == (tokens[-1] in ends)
            assert not ends & {*tokens[:-1]}
        assert stopped.finished.any()


def test_the_tokens_of_a_text_are_counted_up_to_its_end(data, backbone):
    settings = {"quality": "metric", "metric": "squad", "max_target_length": 8}
    core, rows = make(data, backbone, **settings).unwrapped.core, np.arange(12)
    passes, model, tokenizer = core.split("test").passes, core.backbone.model, core.backbone.tokenizer
    inputs = passes.inputs(rows)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def texts():
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        return model.generate(**prompts, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    was = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = end = texts()[0][1]  # so that some texts end, and others do not
    try:
        plain = texts()
        passes.answers(rows, np.zeros((12, len(core.nvec)), dtype=np.int64))
    finally:
        model.generation_config.eos_token_id = was
    ended = [end in text for text in plain]
    assert True in ended
    assert False in ended
    assert passes.finished.tolist() == ended
    assert passes.generated.tolist() == [text.index(end) + 1 if end in text else 8 for text in plain]


def test_dense_agrees_with_itself_whatever_it_writes(data, backbone, monkeypatch):
    """Its text may begin or end with special tokens, and encoded again it would be another one."""
    settings = {"quality": "agreement", "max_target_length": 8, "prompt": "{source_pair} {source}\n"}
    rows, texts = np.arange(12), {}

    def check(stop):
        core = make(data, backbone, stop=stop, **settings).unwrapped.core
        split, decisions = core.split("test"), random_decisions(core, 12, 0.4)
        texts[stop] = split.passes.answers(rows, 0 * decisions)
        agreed = [one == dense for one, dense in zip(split.passes.answers(rows, decisions), texts[stop], strict=True)]
        assert split.scoring.run(rows, 0 * decisions).all()
        assert (split.scoring.run(rows, decisions) <= agreed).all()  # by tokens, of which some are not in a text
        return core

    ends = check(None).backbone.model.generation_config
    words = max(texts[None], key=len).split()
    for stop in (words[1], " ".join(words[1:3]), "Question"):
        check(stop)
        assert [text.partition(stop)[0].strip() for text in texts[None]] == texts[stop]
    vocabulary = PreTrainedTokenizerFast.from_pretrained(backbone).get_vocab()
    monkeypatch.setattr(ends, "eos_token_id", [vocabulary["</s>"], vocabulary[words[1]]])  # as chat models have several
    core = check("Answer")  # a token that no text holds
    model, tokenizer, inputs = core.backbone.model, core.backbone.tokenizer, core.split("test").passes.inputs(rows)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain = model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    written = tokenizer.batch_decode(plain[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in written] == texts["Answer"]


def joining_tokenizer(kind):
    """One that writes a space in front of texts, as Llama 2's does, or one token for ``.`` and a new line (Qwen2's)."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "sentencepiece":
        lines, words = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])  # while it is trained
        tokenizer.decoder, first = decoders.Metaspace(prepend_scheme="first"), []
    else:
        split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+\n*|\s+"), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.decoder, first = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    texts = ["a good film.\nLabel: good.\n", "a bad film.\nLabel: bad.\nLabel:\ngood x\n"] * 9
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=99, **names)


@pytest.mark.parametrize("kind", ["sentencepiece", "merging"])
@pytest.mark.parametrize("stop", [None, "\n"])
@pytest.mark.parametrize(
    ("prompt", "space"), [("{source}\nLabel:", " "), ("{source}\nLabel:\n", ""), ("Label: {source}", " ")]
)
def test_a_target_has_the_tokens_that_it_has_after_the_prompt(kind, stop, prompt, space):
    tokenizer = joining_tokenizer(kind)
    config = BackboneConfig(name="x", prompt=prompt, stop=stop)
    instances = [Instance("", "a bad film", target) for target in ("good", " good.", "bad.")]
    labels = PromptedHead().targets(instances, None, tokenizer, config).labels
    filled = prompt.format(source="a bad film")
    start = len(tokenizer(filled).input_ids)
    for instance, row in zip(instances, labels, strict=True):
        whole = tokenizer(f"{filled}{space}{instance.target.strip()}{stop or '</s>'}").input_ids
        assert row[row >= 0].tolist() == whole[start:]
    nothing = PromptedHead().targets([Instance("", "a bad film", "")], None, tokenizer, config).labels
    assert tokenizer.decode(nothing[0]).strip(" ") == (stop or "</s>")


def test_a_target_ends_at_its_stop():
    config = BackboneConfig(name="x", prompt="{source}\nLabel:", stop="\n")
    texts = "good.\nbad", "good.", "\ngood.", "good.\n "
    tokenizer, instances = joining_tokenizer("merging"), [Instance("", "", text) for text in texts]
    instances.append(replace(instances[0], is_cut=True))
    targets = PromptedHead().targets(instances, None, tokenizer, config)
    assert len({tuple(row) for row in targets.labels.tolist()}) == 1
    assert targets.target_cut.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("kind", ["sentencepiece", "merging"])
def test_a_long_target_ends_as_others_do(kind):
    tokenizer, instance = joining_tokenizer(kind), Instance("", "", "good. bad. good. bad. good.")
    length = len(tokenizer(" good.").input_ids) + 1
    config = BackboneConfig(name="x", prompt="{source}\nLabel:", stop="\n", max_target_length=length)
    targets = PromptedHead().targets([instance], None, tokenizer, config)
    assert tokenizer.decode(targets.labels[0]).strip(" ") == "good.\n"
    assert targets.target_cut.tolist() == [True]
