"""What a file says, made fit for a message: one line of limited length, control characters escaped."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 120
NAMED = 3


def shortened(text: object, longest: int = LONGEST) -> str:
    """`text` as one line of at most `longest` characters; its middle is left out where it is longer.

    What is not printable (line breaks, escapes of terminals, halves of surrogate pairs) is written as Python would.
    """
    whole = str(text)
    line = _escaped(whole[: longest + 1])
    if len(line) <= longest and len(whole) <= longest:
        return line
    half = longest // 2 - 2
    return f"{line[:half]}...{_escaped(whole[-longest:])[-half:]}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(names: Sequence[object], most: int = NAMED) -> str:
    """The first `most` of these names, shortened, and whether there are more."""
    return ", ".join(shortened(name) for name in names[:most]) + (", ..." if len(names) > most else "")
