"""Text from files, their names and what they say of themselves, made fit for a message of one line."""


def shown(text: object, limit: int = 200) -> str:
    """`text` as a string of at most `limit` characters, cut in the middle, with unprintable characters escaped.

    Escaped are line breaks, control characters, marks that turn the writing direction, and bytes of a file name that
    are no text. Spaces stay.
    """
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)]
    printable = "".join(escaped)
    if len(printable) <= limit:
        return printable
    half = limit // 2
    return f"{printable[: limit - half - 1]}…{printable[-half:]}"
