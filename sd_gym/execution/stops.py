"""Texts that end at a stop, such as a new line, whichever tokens complete it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import StoppingCriteria, StoppingCriteriaList


class Stop(StoppingCriteria):
    """Ends a text of ``generate()`` as soon as it contains the stop.

    A stop is not always a token of its own: many tokenizers have one token for a full stop and the new line after it.
    """

    def __init__(self, stop: str, tokenizer: Tokenizer, prompt_length: int) -> None:
        self._stop, self._tokenizer, self._start = stop, tokenizer, prompt_length
        self._last = len(stop.encode()) + 1  # tokens that can hold it; the first one of a text may lose its space

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, bool ``[n]``."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._last :], skip_special_tokens=True)
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


def stopping(stop: str | None, tokenizer: Tokenizer, prompt_length: int) -> dict[str, Any]:
    """The arguments by which ``generate()`` ends at a stop, if there is one."""
    if stop is None:
        return {}
    return {"stopping_criteria": StoppingCriteriaList([Stop(stop, tokenizer, prompt_length)])}


def cut_at_stop(stop: str, tokenizer: Tokenizer, tokens: Tensor, lengths: Tensor, ended: Tensor) -> None:
    """Adjust ``lengths [n]`` of texts, ``tokens [n, length]``, and which ``ended [n]``, to their stops, in place."""
    whole = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for row in [number for number, text in enumerate(whole) if stop in text]:
        own = tokens[row].tolist()
        up_to = (tokenizer.decode(own[:length], skip_special_tokens=True) for length in range(1, len(own) + 1))
        lengths[row] = next(length for length, text in enumerate(up_to, 1) if stop in text)
        ended[row] = True
