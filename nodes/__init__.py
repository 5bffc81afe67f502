"""ComfyUI's floor: sockets, widgets, progress, previews, interruption, model management. No mathematics."""
