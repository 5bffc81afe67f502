"""ComfyUI's door to EchoDistill. Imports wait until ComfyUI asks for the nodes, so that other tools can pass by."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to learn the pack's nodes."""
    from .nodes.extension import EchoDistillExtension

    return EchoDistillExtension()
