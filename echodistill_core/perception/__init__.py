"""Frozen image encoders for the critics, the identity loss and the metrics."""
