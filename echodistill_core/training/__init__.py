"""Training: what learns, the three steps of an iteration, the loop around them, and runs on disk."""
