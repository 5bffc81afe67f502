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
    if len(whole) > longest:
        whole = f"{whole[: longest // 2 - 2]}...{whole[-(longest // 2 - 2) :]}"
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in whole)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def listed(names: Sequence[object], most: int = NAMED) -> str:
    """The first `most` of these names, shortened, and whether there are more."""
    return ", ".join(shortened(name) for name in names[:most]) + (", ..." if len(names) > most else "")
