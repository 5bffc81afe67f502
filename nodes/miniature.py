"""LoadMiniature: the embedded family, for stock nodes and for the nodes of this pack."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..echodistill_core.concept.photographs import to_square
from ..echodistill_core.demo.task import DEFAULT_CONCEPT
from ..echodistill_core.miniature.concepts import CONCEPTS, DEVELOPMENT, photographs
from ..echodistill_core.miniature.render import SIDE
from .bridge.miniature import load_miniature
from .bridge.node_text import shown_on_node
from .bridge.pictures import image_of
from .bridge.widgets import schema


class LoadMiniature(io.ComfyNode):
    """Loads the small model family that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets."""
        return schema(
            node_id="LoadMiniature",
            display_name="Load Miniature",
            search_aliases=("demo", "tiny", "test model", "cpu", "toy"),
            description=(
                "A small diffusion family that comes with the pack: 64x64 pictures of toys, no download, trains in a "
                "minute on a CPU. It is meant for trying the workflows and cannot learn photographs of real objects."
            ),
            inputs=[
                io.Combo.Input(
                    "toy",
                    options=[concept.name for concept in DEVELOPMENT],
                    default=DEFAULT_CONCEPT,
                    tooltip="The toy whose photographs the node outputs. The miniature was not trained on it.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The one-step model."),
                io.Model.Output(display_name="teacher", tooltip="The multi-step model."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder of both models."),
                io.Vae.Output(display_name="vae", tooltip="The VAE: latents 8x smaller, with 8 channels."),
                io.Image.Output(display_name="photographs", tooltip="Five pictures of the toy, for training."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @shown_on_node
    def execute(cls, toy: str) -> io.NodeOutput:
        """Return student, teacher, CLIP, VAE and the toy's photographs."""
        pictures = [to_square(photograph.image, SIDE, "center") for photograph in photographs(CONCEPTS[toy])]
        images = image_of(torch.stack(pictures).float() / 127.5 - 1)
        return io.NodeOutput(*load_miniature(folder_paths.get_folder_paths("embeddings")), images)
