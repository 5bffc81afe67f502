"""Untrusted texts in messages: one line of limited length, with control characters escaped.

A file can hold a name of a megabyte, and control characters in it would act on the terminal.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

LONGEST = 200  # characters
NAMED = 3

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def quoted(value: object) -> str:
    """The repr of a value; the middle of a long one is replaced by "..."."""
    return _short.repr(value)


def shortened(text: object, longest: int = LONGEST) -> str:
    """`text` as one line of at most `longest` characters; its middle is replaced by "..." where it is longer.

    Characters that are not printable are escaped as in a repr: line breaks, terminal escapes, bidirectional marks, lone
    surrogates.
    """
    whole = str(text)
    line = _escaped(whole[: longest + 1])
    if len(line) <= longest and len(whole) <= longest:
        return line
    half = longest // 2 - 2
    return f"{line[:half]}...{_escaped(whole[-longest:])[-half:]}"


def listed(names: Iterable[object], most: int = NAMED) -> str:
    """The first `most` of these names, shortened, followed by the number of the others."""
    given = list(names)
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return f"{', '.join(shortened(name) for name in given[:most])}{more}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
