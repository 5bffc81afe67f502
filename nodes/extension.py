"""The pack as ComfyUI sees it: its nodes, and the folder of its models."""

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

# Not in on_load, which older ComfyUIs do not call.
register_folder()


class EchoDistillExtension(ComfyExtension):
    """EchoDistill's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """In the order of a graph."""
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
