"""Calls of an attached model with an answer stage: their arguments, and outputs where rows that go on are dense."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sd_gym.backbones.heads import Head
from sd_gym.backbones.heads.seq2seq import generated_tokens, judged_text, until_end
from sd_gym.inference.rollout import StagedRollout

CACHES = ("cache", "past_key_values")  # the argument's name, and its deprecated one, which transformers still takes
REFUSED_ARGUMENTS = ("labels", *CACHES, "use_cache", "output_hidden_states", "output_attentions")
Call = Callable[..., Any]


def pass_arguments(head: Head, given: dict[str, Any], *, caches: bool) -> dict[str, Any]:
    """The arguments of a pass whose answer may be replaced; ``caches``: whether the model fills a cache by default."""
    if not head.judges_passes:
        raise ValueError("this policy judges texts that were generated, not a pass; call model.generate()")
    asked = [name for name in REFUSED_ARGUMENTS if given.get(name) is not None and given[name] is not False]
    if asked:
        raise ValueError(f"this policy may replace answers, so a call gives logits alone; leave out {asked[0]}")
    return {**given, "return_dict": True} | ({"use_cache": False} if caches else {})


def generate_arguments(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``generate()`` whose texts may be replaced."""
    once = {"streamer": None, "num_return_sequences": 1, "return_dict_in_generate": False}
    for name, expected in once.items():
        if (value := setting(model, given, name)) not in (None, expected):
            reason = "this policy may replace texts, so generate() gives one text per input, after all are complete"
            raise ValueError(f"{reason}; expected {name}={expected}, got {value}")
    for name in CACHES:
        if given.get(name) is not None:
            raise ValueError(f"this policy may generate a text twice, each time with a new cache; leave {name} out")
    for name in ("logits_processor", "stopping_criteria"):
        if given.get(name):
            reason = "this policy generates some texts again, as a smaller batch, so the rows of a batch change"
            raise ValueError(f"{reason} for your {name}; leave it out")
    if setting(model, given, "stop_strings"):
        raise ValueError(
            "this policy judges a text up to its end token, not up to stop_strings; give eos_token_id instead"
        )
    if given.get("custom_generate"):
        raise ValueError("this policy judges the scores of generate(), which custom_generate replaces; leave it out")
    return {**given, "return_dict_in_generate": True, "output_scores": True}


def final_output(output: Any, judged: Tensor, rollout: StagedRollout, arguments: dict[str, Any], run: Call) -> Any:
    """The logits of a ``judged`` pass, replaced by dense ones (from ``run``) in the rows that go on."""
    logits = {name: value for name, value in output.items() if name.endswith("logits")}
    rollout.answered(judged)
    for picked, block in rollout.going_on():
        with block:
            dense = run(**rows_of(arguments, picked, len(judged)))
        logits = {name: value.index_copy(0, picked.to(value.device), dense[name]) for name, value in logits.items()}
    return type(output)(**logits)


def final_texts(
    output: Any, rollout: StagedRollout, arguments: dict[str, Any], run: Call, model: PreTrainedModel
) -> tuple[Tensor, int]:
    """The sequences of ``generate()``, replaced in the rows that go on, and the length of the longest of these."""
    pad, end = (setting(model, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    lengths, _ = until_end(generated_tokens(output), end)
    rollout.answered(judged_text(model, output, lengths))
    sequences, longest = output.sequences, 0
    padding = pad if pad is not None else end[0] if isinstance(end, list) else end
    for picked, block in rollout.going_on():
        own = rows_of(arguments, picked, len(sequences))
        numbers, start = picked.tolist(), setting(model, arguments, "decoder_start_token_id")
        if isinstance(start, list) or (isinstance(start, Tensor) and start.ndim > 0):  # one per row
            own["decoder_start_token_id"] = [int(start[number]) for number in numbers]
        if (allowed := own.get("prefix_allowed_tokens_fn")) is not None:
            own["prefix_allowed_tokens_fn"] = lambda row, ids, of=numbers, allowed=allowed: allowed(of[row], ids)
        with block:
            again = run(**own).sequences
        longest = max(longest, again.shape[1])
        length = max(longest, sequences.shape[1])
        sequences, again = (F.pad(ids, (0, length - ids.shape[1]), value=padding or 0) for ids in (sequences, again))
        sequences = sequences.index_copy(0, picked.to(sequences.device), again)
    return sequences, longest or sequences.shape[1]


def rows_of(arguments: dict[str, Any], picked: Tensor, n: int) -> dict[str, Any]:
    """Arguments for some rows of a batch of ``n``."""
    return {
        name: value.index_select(0, picked.to(value.device))
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == n
        else value
        for name, value in arguments.items()
    }


def setting(model: PreTrainedModel, given: dict[str, Any], name: str) -> Any:
    """An argument of ``generate()``, or the default for it: of its ``generation_config``, else of the model's."""
    if name in given:
        return given[name]
    own = getattr(given.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if own is None else own
