"""What comes from outside, made fit for a message: one line of limited length, control characters escaped.

A file can hold a name of a megabyte, and a terminal obeys the control characters in it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

LONGEST = 200  # characters
NAMED = 3

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def quoted(value: object) -> str:
    """A value as Python writes it, a text in quotation marks, its middle left out where it is long."""
    return _short.repr(value)


def shortened(text: object, longest: int = LONGEST) -> str:
    """`text` as one line of at most `longest` characters; its middle is left out where it is longer.

    What is not printable is written as Python would: line breaks, escapes of terminals, marks that turn the writing
    direction, halves of surrogate pairs.
    """
    whole = str(text)
    line = _escaped(whole[: longest + 1])
    if len(line) <= longest and len(whole) <= longest:
        return line
    half = longest // 2 - 2
    return f"{line[:half]}...{_escaped(whole[-longest:])[-half:]}"


def listed(names: Iterable[object], most: int = NAMED) -> str:
    """The first `most` of these names, shortened, and how many more there are."""
    given = list(names)
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return f"{', '.join(shortened(name) for name in given[:most])}{more}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
