"""Texts that end at a stop, such as a new line, whichever tokens complete it."""

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import StoppingCriteria, StoppingCriteriaList


class Stop(StoppingCriteria):
    """Ends a text of ``generate()`` as soon as it contains the stop.

    A stop is not always a token of its own: many tokenizers have one token for a full stop and the new line after it.
    """

    def __init__(self, stop: str, tokenizer: Tokenizer, prompt_length: int = 0) -> None:
        self._stop, self._tokenizer, self._start = stop, tokenizer, prompt_length
        self._last = len(stop.encode()) + 1  # tokens that can hold it; the first one of a text may lose its space
        self._skips_special = not any(token in stop for token in tokenizer.all_special_tokens)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, bool ``[n]``."""
        held = self._hold(input_ids[:, self._start :][:, -self._last :].tolist())
        return torch.tensor(held, device=input_ids.device)

    def length(self, tokens: list[int]) -> int | None:
        """How many of the tokens complete the stop; ``None``: it is not in the text."""
        if not self._hold([tokens])[0]:
            return None
        return 1 + bisect_left(range(1, len(tokens)), True, key=lambda length: self._hold([tokens[:length]])[0])

    def _hold(self, tokens: list[list[int]]) -> list[bool]:
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=self._skips_special)
        return [self._stop in text for text in texts]


def stopping(stop: str | None, ends: list[int], tokenizer: Tokenizer, prompt_length: int) -> dict[str, Any]:
    """The arguments by which ``generate()`` ends at one of the tokens ``ends``, and at a stop, if there is one."""
    if stop is None:
        return {}
    given: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    return given | {"stopping_criteria": StoppingCriteriaList([Stop(stop, tokenizer, prompt_length)])}


def cut_at_stop(stop: str, tokenizer: Tokenizer, tokens: Tensor, lengths: Tensor, ended: Tensor) -> None:
    """Adjust ``lengths [n]`` of texts, ``tokens [n, length]``, and which ``ended [n]``, to their stops, in place."""
    search = Stop(stop, tokenizer)
    for row, (own, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        if (found := search.length(own[:length])) is not None:
            lengths[row], ended[row] = found, True
