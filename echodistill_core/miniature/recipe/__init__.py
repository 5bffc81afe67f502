"""How the miniature is made: from the renderer to the shipped weights, by one command."""
