"""The newcomer's first command: the embedded family learns one thing, and a page shows what came of it."""
