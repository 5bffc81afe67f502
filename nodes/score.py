"""ScoreEcho: how much pictures are the subject, and how much they are the prompt."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from ..echodistill_core.errors import InputError
from ..echodistill_core.evaluation.metrics import PROTOCOLS
from ..echodistill_core.evaluation.pictures import score_pictures
from ..echodistill_core.perception.load import BackboneFiles
from .bridge.backbones import look_for
from .bridge.node_text import say, shown_on_node
from .bridge.pictures import unit_of
from .bridge.sockets import Concept, ConceptSocket
from .bridge.widgets import schema

TITLES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}


class ScoreEcho(io.ComfyNode):
    """The field's three figures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        titles = "; ".join(f"{name}: {protocol.title}" for name, protocol in PROTOCOLS.items())
        return schema(
            node_id="ScoreEcho",
            display_name="Score Echo",
            search_aliases=("clip score", "dino", "similarity", "metrics", "subject fidelity", "evaluate"),
            description=(
                "CLIP-T (does the picture follow the prompt), CLIP-I and DINO (is it that very subject), each a mean "
                "cosine; only figures of one protocol compare."
            ),
            inputs=[
                io.Image.Input("images", tooltip="Pictures of one prompt."),
                ConceptSocket.Input("concept", tooltip="The photographs to compare with."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What the pictures were made from."),
                io.Combo.Input(
                    "protocol",
                    options=list(PROTOCOLS),
                    default="dreambooth",
                    tooltip=f"Which encoders look. {titles}.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The figures as text."),
                io.Float.Output(display_name="clip_t", tooltip="Prompt fidelity; not a number without its encoder."),
                io.Float.Output(display_name="clip_i", tooltip="Subject fidelity by CLIP; likewise."),
                io.Float.Output(display_name="dino", tooltip="Subject fidelity by DINO; likewise."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(cls, images: Any, concept: Concept, prompt: str, protocol: str) -> io.NodeOutput:
        """The figures."""
        chosen = PROTOCOLS[protocol]
        backbone_files: dict[str, BackboneFiles] = {}
        missing = ""
        if protocol != "miniature":
            backbone_files, missing = look_for([chosen.clip, chosen.dino])
            if not backbone_files:
                raise InputError(missing)
        scores = score_pictures(
            unit_of(images), concept.photographs, prompt, concept.placeholder, chosen, backbone_files
        )
        text = "\n".join([*(f"{TITLES[name]} {value:.3f}" for name, value in scores.items()), *filter(None, [missing])])
        say(cls.hidden.unique_id, text)
        figures = [scores.get(name, math.nan) for name in TITLES]
        return io.NodeOutput(text, *figures, ui=ui.PreviewText(text))
