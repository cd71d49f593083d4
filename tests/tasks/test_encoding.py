"""Inputs as tokens: no more than the limit, whatever the characters, and the same in threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sd_gym.backbones.heads import PromptedHead, Seq2SeqHead
from sd_gym.config import BackboneConfig
from sd_gym.data.instance import Instance
from sd_gym.tasks.encoding import encode, texts_and_tokens
from tests.conftest import WORDS

LIMIT = 12


def of_bytes():
    """A tokenizer of bytes, so characters beyond ASCII have several tokens, with one merge: "[]"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet, "[]"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("[", "]")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@settings(deadline=None)
@example(["]aaaaaaaa["])  # which has one token less in the prompt, at each end
@given(st.lists(st.text("ab 中😀é[]", min_size=1, max_size=12), min_size=1, max_size=4))
def test_prompts_have_no_more_tokens_than_the_limit(documents):
    """Where a document is cut inside a character, or makes other tokens with the prompt than alone."""
    tokenizer, backbone = of_bytes(), BackboneConfig(name="x", max_source_length=LIMIT, prompt="Q[{source}]A")
    instances = [Instance(str(number), text, "a") for number, text in enumerate(documents)]
    encoded = encode(instances, tokenizer, PromptedHead(), backbone)
    assert (encoded.source_length <= LIMIT).all()
    for instance, cut in zip(instances, encoded.source_cut, strict=True):
        (prompt,), _ = texts_and_tokens(instance, tokenizer, backbone)
        document = prompt[2:-2]
        assert instance.source.startswith(document)
        assert (document == instance.source) == (not cut)
        assert cut == (len(tokenizer(f"Q[{instance.source}]A").input_ids) > LIMIT)  # what just fits is whole


def test_threads_get_the_tokens_of_a_single_one(tiny_tokenizer):
    """The tokenizer keeps its truncation from call to call, and inputs and references have different ones."""
    random, backbone = np.random.default_rng(0), BackboneConfig(name="x", max_source_length=16, max_target_length=3)
    texts = [" ".join(random.choice(WORDS, 10)) for _ in range(16)]
    instances = [Instance(str(number), text, text) for number, text in enumerate(texts)]
    head = Seq2SeqHead()

    def lengths(_):
        return encode(instances, tiny_tokenizer, head, backbone).source_length.tolist()

    expected, interval = lengths(0), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lengths, range(200))) == [expected] * 200
    finally:
        sys.setswitchinterval(interval)
