"""The ComfyUI entry point. It imports the nodes only when ComfyUI asks for them, so other tools can import the pack."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Return the extension that lists the pack's nodes; ComfyUI calls it."""
    from .nodes.extension import EchoDistillExtension

    return EchoDistillExtension()
