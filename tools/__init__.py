"""Generators of the pack's locales, pictures and workflows."""
