"""Exported policies: the answers, decisions and FLOPs of ``sd_gym.load``, without torch; damaged files are named."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import sd_gym
from sd_gym.cli import app
from sd_gym.errors import DataError
from sd_gym.inference.manifest import MANIFEST, own_hash
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy
from sd_gym.tasks.classification import Classification
from tests.conftest import ENCODER, WORDS, make_model
from tests.envs.conftest import MODELS, trained
from tests.inference.conftest import lines_of, write

onnx = pytest.importorskip("sd_gym.inference.onnx")


def few_masks(task, folder, tokenizer, observation="pooled", masks=2):
    """A policy that decides among a few of its own masks, and texts."""
    core, policy, artefact, texts = trained(task, None, folder, tokenizer, observation)
    network = policy.reduced(masks, core.observe(core.split("train"), np.arange(len(core.split("train")))))
    network.codebook = network.codebook.clone()
    network.codebook[-1, :-1] = 1  # a graph that does not read the attention mask
    return replace(artefact, network=network), texts


POINTS = [(-1.0, 0.03, 0.3), (0.0, 0.02, 0.4), (2.0, 0.01, 0.6), (6.0, 0.005, 0.8), (1000.0, 0.0, 1.0)]


def with_points(policy):
    """A policy with operating points of these margins, losses and shares of FLOPs."""
    return replace(policy, operating_points=tuple(OperatingPoint(*one[:2], *one[1:], True) for one in POINTS))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """A policy, the folder that it was exported to, and texts."""
    folder = tmp_path_factory.mktemp("policy")
    policy, texts = few_masks("classification", folder, tiny_tokenizer, masks=4)
    policy = with_points(policy)
    sd_gym.export(policy, folder / "onnx")
    return policy, folder / "onnx", texts


def random_texts(count):
    """Some are cut, some have one word, or words that the tokenizer does not know."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice([*WORDS, "strange"], random.integers(1, 40))) for _ in range(count)]


def check_same(policy, folder, texts, **limits):
    wanted, came = sd_gym.load(policy, **limits).answers(texts), onnx.load(folder, **limits)(texts)
    assert [one.answer for one in came] == [one.answer for one in wanted]
    np.testing.assert_array_equal([one.skip for one in came], [one.skip for one in wanted])
    np.testing.assert_allclose([one.flops_ratio for one in came], [one.flops_ratio for one in wanted], rtol=1e-12)
    for name in ("unknown_tokens", "went_on"):
        assert [getattr(one, name) for one in came] == [getattr(one, name) for one in wanted]
    return came


def test_texts_are_answered_as_by_load(exported):
    policy, folder, texts = exported
    texts = texts + random_texts(200)
    came = check_same(policy, folder, texts)
    assert len({tuple(one.skip) for one in came}) > 1
    check_same(policy, folder, [*texts, *((text, "the food was good") for text in texts)])
    dense = sd_gym.load(policy).answers(texts, dense=True)
    assert [one.answer for one in onnx.load(folder)(texts, dense=True)] == [one.answer for one in dense]
    assert [one.answer for one in onnx.load(folder)(texts, batch_size=3)] == [one.answer for one in came]
    assert onnx.load(folder)([]) == []


@pytest.mark.parametrize(("task", "observation"), [("pairs", "tokens"), ("scores", "pooled"), ("extracted", "pooled")])
def test_other_heads_and_observations(task, observation, tmp_path, tiny_tokenizer):
    policy, texts = few_masks(task, tmp_path, tiny_tokenizer, observation)
    sd_gym.export(policy, tmp_path / "onnx")
    check_same(policy, tmp_path / "onnx", texts)


@pytest.mark.parametrize("name", ENCODER)
def test_logits_are_those_of_the_bank(name, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(MODELS, "classification", (lambda: make_model(name), MODELS["classification"][1]))
    policy, texts = few_masks("classification", tmp_path, tiny_tokenizer, masks=5)
    layers = [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]  # the first two layers agree in these alone
    policy.network.codebook[:, :-1] = torch.tensor([[0] * 6, [0, 1, 0, 0, 1, 0], *layers])
    for number, book in enumerate([policy.network.codebook, policy.network.codebook[[0, 2, 3, 4]]]):
        policy.network.codebook = book
        sd_gym.export(policy, tmp_path / f"onnx-{number}")
        model, graphs = sd_gym.load(policy), onnx.load(tmp_path / f"onnx-{number}")
        given = dict(model.tokenizer(texts, padding=True, return_tensors="pt"))
        inputs = {name: value.numpy() for name, value in given.items()}
        with torch.inference_mode():
            wanted = [plain(**given).logits.numpy() for plain in sd_gym.bank(model.model, graphs.masks)]
        came = [graphs.run(mask, inputs)[0] for mask in range(len(graphs.masks))]
        np.testing.assert_allclose(came, wanted, atol=1e-4)
    assert len(graphs.manifest["branches"]) < 6 or name == "distilbert"  # whose layers add the residual themselves


LIMITS = [{}, {"max_loss": 0.01}, {"max_flops": 0.9}]


def test_operating_points_are_chosen_as_by_load(exported):
    policy, folder, texts = exported
    shares = [check_same(policy, folder, texts, **limits)[0].flops_ratio for limits in LIMITS]
    assert len(set(shares)) > 1
    with pytest.raises(ValueError, match=r"no operating point fits max_flops=0\.1"):
        onnx.load(folder, max_flops=0.1)
    one, other = onnx.load(folder), onnx.load(folder, max_flops=0.9)
    assert one.fingerprints["policy"] != other.fingerprints["policy"]  # a run is not resumed with the other


def test_margins_of_numbered_masks_are_those_of_load(tmp_path, tiny_tokenizer):
    """Of a policy that has learned on a table of few masks, so that it chooses a number."""
    policy, texts = few_masks("classification", tmp_path, tiny_tokenizer, masks=6)
    whole, book = policy.network, policy.network.codebook.numpy()
    network = DecisionPolicy(whole.observation_size, [len(book)], [], graded=True)
    network.head.weight.data *= 20  # so that a margin changes some decisions
    policy = with_points(replace(policy, network=TablePolicy(network, whole.nvec, whole.switches, book, None)))
    sd_gym.export(policy, tmp_path / "onnx")
    for limits in LIMITS:
        check_same(policy, tmp_path / "onnx", texts + random_texts(100), **limits)


def judging(task, folder, tokenizer, observation, masks):
    """A policy that judges the answers under these masks, and texts."""
    *_, policy, texts = trained(task, None, folder, tokenizer, observation, stages=("first", "answer"))
    book = [[*mask, 0, -1] for mask in masks] + [[-1] * 7 + [choice] for choice in (0, 1)]
    policy.network.codebook = torch.tensor(book)
    return with_points(policy), texts


@pytest.fixture(scope="module")
def exported_judging(tmp_path_factory, tiny_tokenizer):
    """As ``exported``, of a policy that judges the answers."""
    folder, masks = tmp_path_factory.mktemp("judging"), [[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 0]]
    policy, texts = judging("classification", folder, tiny_tokenizer, "pooled", masks)
    sd_gym.export(policy, folder / "onnx")
    return policy, folder / "onnx", texts


def test_where_the_answer_is_not_accepted_rows_go_on(exported_judging):
    policy, folder, texts = exported_judging
    assert sum(first > 0 for first in onnx.load(folder).manifest["resumed_from"]) == 3  # dense, and of three masks two
    for limits in LIMITS[:2]:
        assert any(one.went_on for one in check_same(policy, folder, texts, **limits))


def test_a_graph_of_one_mask_answers_as_the_export_does_under_it(exported_judging, tmp_path):
    """The graphs that ``benchmarks/deployment.py`` compares a policy with."""
    from benchmarks import deployment  # it needs ONNX Runtime

    _, folder, texts = exported_judging
    folder = shutil.copytree(folder, tmp_path / "copy")
    model = onnx.load(folder)
    batch = model.batch(model.encoded([[text] for text in texts[:7]]))
    for number in range(len(model.masks)):
        plain = deployment.Plain(folder, number, deployment.onnxruntime.SessionOptions())
        np.testing.assert_array_equal(plain.run(0, batch)[0], model.run(number, batch)[0])
        ran = {one.flops_ratio for one in plain.answers([[text] for text in texts], dense=True)}
        assert ran == {1.0} if number == 0 else max(ran) < 1


@pytest.mark.parametrize("name", ENCODER)
def test_rows_go_on_from_their_states_alone(name, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(MODELS, "classification", (lambda: make_model(name), MODELS["classification"][1]))
    masks = [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]]
    policy, texts = judging("classification", tmp_path, tiny_tokenizer, "pooled", masks)
    sd_gym.export(policy, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx")
    batch = model.batch(model.encoded([[text] for text in texts[:7]]))
    [dense] = model.run(onnx.DENSE, batch)
    for number in range(1, 4):
        answers, states = model.run(number, batch)
        assert not np.allclose(answers, dense, atol=1e-4)
        other = batch | {"input_ids": batch["input_ids"][::-1]}
        np.testing.assert_allclose(model.run_rest(number, other, states), dense, atol=1e-5)
    assert [file.stem for file in sorted((tmp_path / "onnx").glob("*.onnx"))] == ["answer", "decide", "model"]


def test_rows_of_several_passes_go_on_together(exported_judging, monkeypatch):
    policy, folder, texts = exported_judging
    model, ran = onnx.load(folder), []
    run_rest, dense = model.run_rest, sd_gym.bank(sd_gym.load(policy).model, model.masks[:1])[0]

    def recorded(number, batch, states):
        values = run_rest(number, batch, states)
        given = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            np.testing.assert_allclose(values, dense(**given).logits.numpy(), atol=1e-4)
        ran.append((number, len(values), states.size))
        return values

    monkeypatch.setattr(model, "run_rest", recorded)
    texts = (texts + random_texts(40)) * 2
    answers = model.answers(texts, batch_size=4)
    numbers, sizes, states = map(np.array, zip(*ran, strict=True))
    assert sizes.sum() == sum(one.went_on for one in answers)
    assert sizes.max() == 4
    assert (sizes < 4).sum() < len(sizes) / 2
    skips_first = model.masks[:, :2].any(axis=1)
    np.testing.assert_array_equal(states == 0, skips_first[numbers])
    assert 0 < (states == 0).sum() < len(states)


def test_a_cascade_keeps_its_operating_points(tmp_path, tiny_tokenizer):
    """It decides on one mask, and looks at the answer alone."""
    *_, policy, texts = trained("classification", None, tmp_path, tiny_tokenizer, stages=("first", "answer"))
    with torch.no_grad():
        policy.network.head.weight[:-2] = 0
        policy.network.head.bias[[1, 2, 4, 7, 8, 11]] += 10  # to skip the switches 0, 3 and 5
    policy = with_points(policy)
    manifest, each_point = sd_gym.export(policy, tmp_path / "onnx"), ({"max_flops": 0.3}, {}, {"max_loss": 0.0})
    assert manifest["masks"] == [[0] * 6, [1, 0, 0, 1, 0, 1]]
    assert [OperatingPoint(**one) for one in manifest["operating_points"]] == list(policy.operating_points)
    went_on = [
        np.mean([one.went_on for one in check_same(policy, tmp_path / "onnx", texts, **each)]) for each in each_point
    ]
    assert went_on[-1] == 0  # nothing is skipped
    assert len({*went_on}) > 1


@pytest.mark.parametrize("observation", ["pooled", "tokens"])
def test_one_mask_for_all_inputs_is_decided_without_reading_them(tmp_path, tiny_tokenizer, observation):
    *_, policy, texts = trained(
        "classification", None, tmp_path, tiny_tokenizer, observation, stages=("first", "answer")
    )
    judgement = len(sd_gym.load(policy).backbone.head.judgement)
    for unread in (False, True):
        network = policy.network.with_mask(np.array([1, 0, 0, 1, 0, 1, 0, 0]))
        with torch.no_grad():
            weight = network.body[0].weight
            weight[:, network.observation_size - judgement : network.observation_size] *= 1000  # so that answers differ
            if unread:
                weight[:, 3 : network.observation_size - judgement] = 0
                weight[:, network.observation_size :] = 0
        static = with_points(replace(policy, network=network))
        sd_gym.export(static, folder := tmp_path / f"onnx-{unread}")
        assert (folder / "decide.onnx").exists() == (not unread)
        for limits in LIMITS[:2]:
            answers = check_same(static, folder, texts + random_texts(50), **limits)
            assert len({one.went_on for one in answers}) == 2


def test_spans_are_judged_in_their_context(tmp_path, tiny_tokenizer):
    policy, texts = judging("extracted", tmp_path, tiny_tokenizer, "tokens", [[0, 0, 1, 1, 0, 1]])
    sd_gym.export(policy, tmp_path / "onnx")
    assert any(one.went_on for one in check_same(policy, tmp_path / "onnx", texts))


def test_evaluate_counts_that_rows_go_on(exported_judging):
    policy, folder, texts = exported_judging
    result, wanted = sd_gym.evaluate(policy.card["env"]["id"], folder), sd_gym.load(policy).answers(texts)
    assert result["goes_on"] == np.mean([one.went_on for one in wanted])
    assert result["flops_ratio_with_policy"] == pytest.approx(np.mean([one.flops_ratio for one in wanted]))


def test_all_masks_share_one_graph_and_its_weights(exported):
    _, folder, _ = exported
    assert {file.name for file in folder.glob("*.onnx")} == {"decide.onnx", "model.onnx"}
    backbone = folder.parent / "backbone" / "model.safetensors"
    assert (folder / "weights.bin").stat().st_size < 4 * backbone.stat().st_size  # weights begin at whole pages
    assert not (folder / "export.tmp").exists()


def test_neither_torch_nor_what_else_sd_gym_needs_is_imported(exported):
    _, folder, texts = exported
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('gymnasium', 'torch', 'transformers', 'pydantic', 'filelock'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import sd_gym.onnx\n"
        "print(len(sd_gym.onnx.load(sys.argv[1])([sys.argv[2]])[0].skip))\n"
        "assert not {'torch', 'transformers', 'gymnasium'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), texts[0]], capture_output=True, text=True)
    assert done.stdout.strip() == "6", done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "decide.onnx", "weights.bin", "tokenizer.json"])
def test_a_flipped_byte_is_an_error_that_names_the_file(name, exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "onnx")
    file = tmp_path / "onnx" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
        onnx.load(tmp_path / "onnx")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        onnx.load(tmp_path / "onnx")


def test_a_folder_of_another_version_is_an_error(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "onnx")
    file = tmp_path / "onnx" / MANIFEST
    manifest = json.loads(file.read_text()) | {"format": 4}
    manifest["files"][MANIFEST] = own_hash(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="expected format 7, got 4; export anew"):
        onnx.load(tmp_path / "onnx")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_manifest_is_an_error_that_names_it(exported, tmp_path, data):
    folder = tmp_path / "onnx"
    if not folder.exists():
        shutil.copytree(exported[1], folder)
    content = (exported[1] / MANIFEST).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "byte", "key"]))
    if kind == "cut":
        changed = content[:place]
    elif kind == "byte":
        changed = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    else:
        said = json.loads(content)
        said[data.draw(st.sampled_from(sorted(said)))] = data.draw(st.none() | st.integers() | st.text(max_size=3))
        changed = json.dumps(said).encode()
    (folder / MANIFEST).write_bytes(changed)
    try:
        same = json.loads(changed) == json.loads(content)
    except ValueError:
        same = False
    if not same:
        with pytest.raises(ValueError, match=MANIFEST):
            onnx.load(folder)


def test_what_cannot_be_exported_says_so_and_what_to_do(tmp_path, tiny_tokenizer):
    _, _, artefact, _ = trained("classification", None, tmp_path, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"more than 5 masks.*sd-gym reduce RUN --codebook 5"):
        sd_gym.export(artefact, tmp_path / "onnx", masks=5)
    for change, why in (
        ({"noise": "hash"}, "it is a control"),
        ({"stages": ["first", "encoder.1", "answer"]}, "it decides in the middle of the pass, at encoder.1"),
    ):
        network = artefact.network.with_margin(0.0)
        vars(network).update(change)
        with pytest.raises(ValueError, match=f"cannot be exported to ONNX: {why}"):
            sd_gym.export(replace(artefact, network=network), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_backbone_that_generates_is_not_exported(tmp_path, tiny_tokenizer):
    _, _, artefact, _ = trained("summarization", None, tmp_path, tiny_tokenizer)
    artefact.network.codebook = torch.zeros((1, len(artefact.network.nvec)), dtype=torch.int64)  # few masks
    with pytest.raises(ValueError, match="its backbone, a bart, is no encoder"):
        sd_gym.export(artefact, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("task", "stages", "output", "why"),
    [
        ("classification", ["first"], "data", "is not empty"),
        ("classification", ["first", "encoder.1"], "onnx", "in the middle of the pass"),
        ("summarization", ["first"], "onnx", "is no encoder"),
    ],
)
def test_what_cannot_be_exported_is_not_reduced_before(
    task, stages, output, why, tmp_path, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr("sd_gym.agents.experiment.reduction.reduce", pytest.fail)
    trained(task, None, tmp_path, tiny_tokenizer, stages=stages)
    (tmp_path / "artefact" / "config.json").write_text("{}")  # as in a run's folder
    command = ["export", str(tmp_path / "artefact"), "--output", str(tmp_path / output)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert why in done.output


def test_a_folder_that_holds_anything_is_not_written_to(exported, tmp_path):
    policy, folder, _ = exported
    with pytest.raises(FileExistsError, match="is not empty"):
        sd_gym.export(policy, folder)
    (tmp_path / "export.tmp").mkdir()  # of an export that was killed
    assert sd_gym.export(policy, tmp_path)["masks"]
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "sd_gym_onnx.json").unlink()  # killed before the last file
    with pytest.raises(FileExistsError, match="holds an export that was cut off; delete it"):
        sd_gym.export(policy, tmp_path)
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        sd_gym.export(policy, tmp_path)


def test_a_folder_stays_where_it_was_when_it_was_loaded(exported, tmp_path, monkeypatch):
    _, folder, texts = exported
    monkeypatch.chdir(folder.parent)
    model = onnx.load(folder.name)
    monkeypatch.chdir(tmp_path)
    assert len(model(texts[:2])) == 2


def test_a_task_that_changes_its_texts_is_not_exported(exported, tmp_path, monkeypatch):
    policy, _, _ = exported
    instance = Classification.instance

    def lower(self, row, *args, **options):
        return instance(self, {**row, "text": row["text"].lower().strip()}, *args, **options)

    monkeypatch.setattr(Classification, "instance", lower)
    with pytest.raises(ValueError, match="the task classification changes its texts"):
        sd_gym.export(policy, tmp_path / "own")


def test_malformed_inputs_are_named(exported):
    model = onnx.load(exported[1])
    with pytest.raises(ValueError, match="input 1: expected text and text_pair"):
        model(["good", 3])
    with pytest.raises(ValueError, match="expected a list of inputs"):
        model("good")
    with pytest.raises(ValueError, match="got a DataFrame; pass one of its columns"):
        model(pd.DataFrame({"text": ["good"]}))
    with pytest.raises(ValueError, match="batch size of at least 1"):
        model(["good"], batch_size=0)


def test_a_text_of_which_no_token_is_left_is_named(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    policy, texts = few_masks("classification", tmp_path, tokenizer)
    sd_gym.export(policy, tmp_path / "onnx")
    for model in (sd_gym.load(policy), onnx.load(tmp_path / "onnx")):
        with pytest.raises(DataError, match="the input: the tokenizer has no token for"):
            model(["\u200b"])
        with pytest.raises(DataError, match="input 1: the tokenizer has no token"):
            model([texts[0], "\u200b", "\u200b"])
    assert model([texts[0]])


def test_a_context_without_a_token_is_named_where_there_must_be_an_answer(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    policy, texts = few_masks("extracted", tmp_path, tokenizer)
    own = policy.card["env"]
    for may in (True, False):
        policy.card["env"] = own | {"data": own["data"] | {"unanswerable": may}}
        sd_gym.export(policy, tmp_path / f"{may}")
        for model in (sd_gym.load(policy), onnx.load(tmp_path / f"{may}")):
            blank = {**texts[0], "context": "\u200b"}
            if may:
                assert model([blank, texts[1]])[0].answer == ""
                continue
            with pytest.raises(DataError, match=r"the input: the context .* has no token that an answer could be"):
                model([blank])
            with pytest.raises(DataError, match=r"input 1: the context .* has no token"):
                model([texts[1], blank])


def test_a_copy_reads_the_folder_again(exported):
    model = onnx.load(exported[1])
    model.margin = np.float32(2.0)
    for came in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert came.margin == 2
        assert came.fingerprints == model.fingerprints != onnx.load(exported[1]).fingerprints
        assert [one.flops_ratio for one in came(exported[2])] == [one.flops_ratio for one in model(exported[2])]


def test_a_model_with_options_is_not_copied(exported):
    model = onnx.load(exported[1], session_options=onnx.runtime().SessionOptions())
    with pytest.raises(TypeError, match=r"call sd_gym.onnx.load in each process"):
        pickle.dumps(model)


def test_questions_are_measured_by_a_tokenizer_that_was_read_once(tmp_path, tiny_tokenizer, monkeypatch):
    policy, texts = few_masks("extracted", tmp_path, tiny_tokenizer)
    sd_gym.export(policy, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx")
    monkeypatch.setattr(onnx, "Tokenizer", None)
    assert len(model(texts)) == len(texts)
    with pytest.raises(DataError, match="input 1: the question alone has 43 of 26 tokens"):
        model([texts[0], {**texts[1], "question": "food " * 40}])


def test_a_missing_package_is_a_line_before_any_work(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("sd_gym.inference.export.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    source = write(tmp_path / "in.jsonl", [{"text": "good"}])
    artefact = str(exported[1].parent / "artefact")
    for command in (["export", artefact], ["run", str(exported[1]), "--input", str(source)]):
        done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert "pip install 'sd-gym[onnx]'" in done.output


def test_evaluate_judges_the_graphs_on_any_split(exported):
    policy, folder, texts = exported
    env = policy.card["env"]["id"]
    result = sd_gym.evaluate(env, folder, "test")
    wanted = sd_gym.load(policy).answers(texts)
    assert result["flops_ratio_with_policy"] == pytest.approx(np.mean([one.flops_ratio for one in wanted]))
    assert result["decisions_used"] == len({tuple(one.skip) for one in wanted})
    rows = [json.loads(line) for line in (folder.parent / "data" / "test.jsonl").read_text().splitlines()]
    right = [one.answer == f"LABEL_{row['label']}" for one, row in zip(wanted, rows, strict=True)]
    assert result["quality"] == np.mean(right)
    with pytest.raises(ValueError, match="was selected already"):
        sd_gym.evaluate(env, folder, select=True)
    with pytest.raises(ValueError, match="cuts inputs at 26 tokens, the env at 30; pass max_source_length=26"):
        sd_gym.evaluate(env, folder, max_source_length=30)


def test_its_commands_and_in_int8_decisions_stay_the_same(exported, tmp_path):
    policy, folder, texts = exported
    network = copy.deepcopy(policy.network)
    network.codebook = network.codebook[[0, -1]]
    small = replace(policy, network=network)
    small.save_pretrained(tmp_path / "policy")
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(tmp_path / "policy"), "--output", str(tmp_path / "onnx"), "--int8"])
    assert done.exit_code == 0, done.output
    assert "dense among them" in done.output
    wanted = [one.skip for one in sd_gym.load(small).answers(texts)]
    np.testing.assert_array_equal([one.skip for one in onnx.load(tmp_path / "onnx")(texts)], wanted)
    assert "MatMulInteger" in (tmp_path / "onnx" / "model.onnx").read_bytes().decode(errors="ignore")
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    command = ["run", str(folder), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    done = runner.invoke(app, [*command, "--compare"])
    assert done.exit_code == 0, done.output
    assert [one["answer"] for one in lines_of(tmp_path / "out.jsonl")] == [
        one.answer for one in onnx.load(folder)(texts)
    ]
    done = runner.invoke(app, [*command[:-1], str(tmp_path / "other.jsonl"), "--backbone", "elsewhere"])
    assert done.exit_code == 2
    assert "is exported" in done.output
    done = runner.invoke(app, [*command[:-1], str(tmp_path / "other.jsonl"), "--max-flops", "0.1"])
    assert "no operating point fits max_flops=0.1" in done.output
    done = runner.invoke(app, ["evaluate", str(folder)])
    assert done.exit_code == 0, done.output
    assert "in ONNX" in done.output


@pytest.fixture
def splitting(tiny_tokenizer):
    """A tokenizer that reads special tokens in a text as text, so that users cannot write them."""
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "[SEP]", "split_special_tokens": True}
    backend = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


def test_a_tokenizer_that_reads_special_tokens_as_text_stays_so(tmp_path, splitting):
    policy, texts = few_masks("classification", tmp_path, splitting)
    sd_gym.export(policy, tmp_path / "onnx")
    ours, exported = sd_gym.load(policy), onnx.load(tmp_path / "onnx")
    assert ours.tokenizer.split_special_tokens
    injected = [f"a[SEP]b {text}" for text in texts]
    for own, theirs in zip(ours(injected), exported(injected), strict=True):
        assert (own.answer, own.skip.tolist(), own.flops_ratio) == (
            theirs.answer,
            theirs.skip.tolist(),
            pytest.approx(theirs.flops_ratio),
        )


def test_questions_are_measured_with_the_same_tokens(tmp_path, splitting):
    policy, _ = few_masks("extracted", tmp_path, splitting)
    sd_gym.export(policy, tmp_path / "onnx")
    question = [["[SEP]" * 30, "the food was good"]]
    (ours,), (theirs,) = sd_gym.load(policy)(question), onnx.load(tmp_path / "onnx")(question)
    assert ours.answer == theirs.answer


@pytest.mark.parametrize(("providers", "got"), [(["Nope"], "Nope"), ("Nope", "Nope"), ([], "none")])
def test_providers_that_are_none_are_refused(exported, providers, got):
    with pytest.raises(ValueError, match=f"providers: expected some of .*CPUExecutionProvider.*; got {got}"):
        onnx.load(exported[1], providers=providers)
    for known in ("CPUExecutionProvider", [("CPUExecutionProvider", {})]):
        assert onnx.load(exported[1], providers=known)(["good food"])


def test_an_export_needs_a_mask(exported, tmp_path):
    with pytest.raises(ValueError, match="masks: expected at least 1, got 0"):
        sd_gym.export(exported[0], tmp_path / "onnx", masks=0)
