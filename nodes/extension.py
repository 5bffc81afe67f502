"""Registers the pack's nodes and its models folder with ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .bridge.backbones import register_folder
from .echo import EchoStage
from .load_adapter import LoadEchoAdapter
from .miniature import LoadMiniature
from .reference_images import LoadReferenceImages
from .sample import OneStepSample
from .save_adapter import EchoAdapterInfo, SaveEchoAdapter
from .score import ScoreEcho
from .train import EchoDistillTrain

# At import, because older ComfyUI versions do not call on_load.
register_folder()


class EchoDistillExtension(ComfyExtension):
    """EchoDistill's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes, in the order in which a graph uses them."""
        return [
            LoadMiniature,
            LoadReferenceImages,
            EchoDistillTrain,
            EchoStage,
            LoadEchoAdapter,
            OneStepSample,
            SaveEchoAdapter,
            EchoAdapterInfo,
            ScoreEcho,
        ]
