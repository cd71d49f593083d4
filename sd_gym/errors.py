"""How errors speak: in one line, that is not too long."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST_VALUE = 80
LONGEST_MESSAGE = 300
_REPR = reprlib.Repr()  # stops early, so that the message of a huge value takes no time
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 4 * LONGEST_VALUE
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = LONGEST_VALUE


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and line."""


class BackboneError(ValueError):
    """A backbone that cannot be used; the message says what was expected, what came, and what to do."""


def short(value: Any) -> str:
    """A value as a message shows it."""
    return _cut(_REPR.repr(value), LONGEST_VALUE)


def one_line(error: BaseException) -> str:
    """What an error of a library says."""
    return _cut(" ".join(str(error).split()) or type(error).__name__, LONGEST_MESSAGE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def quiet() -> None:
    """One bar at a time, and one line an error: transformers has bars and tables of its own for loading weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
