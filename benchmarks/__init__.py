"""What the README's figures come from: each module is one command that prints a table and writes JSON."""
