"""The ComfyUI nodes: sockets, widgets, progress, previews, interruption, model management. No mathematics."""
