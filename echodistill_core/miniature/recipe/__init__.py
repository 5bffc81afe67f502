"""The training recipe of the miniature: from the renderer to the package's weights, by one command."""
