"""Frozen image encoders: what the critics look with and the identity loss compares."""
