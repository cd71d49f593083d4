"""Errors, and values in messages that stay short."""

from __future__ import annotations

import os
import reprlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_VALUE = 80
LONGEST_MESSAGE = 300
_REPR = reprlib.Repr()  # stops early, so that a huge value takes no time
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 4 * LONGEST_VALUE
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = LONGEST_VALUE


class DataError(ValueError):
    """An invalid data set; the message names the file and line."""


class BackboneError(ValueError):
    """An unusable backbone; the message says what was expected, what came, and what to do."""


class MissingExtraError(ModuleNotFoundError):
    """An optional package is not installed; the message says how to install it."""


def short(value: Any) -> str:
    """A value as text of limited length, for messages."""
    return _cut(_REPR.repr(value), LONGEST_VALUE)


def no_context(text: str | None) -> str:
    """The message for a context in which no answer can be, where the model may not say that there is none."""
    return f"the context {short(text)} has no token that an answer could be; unanswerable=true allows no answer"


def one_line(error: BaseException) -> str:
    """The message of a library's error as one line of limited length."""
    return _cut(" ".join(str(error).split()) or type(error).__name__, LONGEST_MESSAGE)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first problem that pydantic found is (keys, with dots between them), and what it is."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])), f"{first['msg']}, got {short(first['input'])}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers, which would break up the command's own output."""
    os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "error", "1"  # if imported later
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
