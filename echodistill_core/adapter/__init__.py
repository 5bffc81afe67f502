"""Adapters: the trained differences as files that other tools also load, applying them, and exports."""
