"""Converts between ComfyUI's objects and the core's: weights, placeholders, pictures, paths, progress, memory."""
