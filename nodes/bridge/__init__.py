"""Between ComfyUI's objects and the core's: weights, words, pictures, folders, progress, memory."""
