"""ScoreEcho: CLIP-T, CLIP-I and DINO scores of pictures."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from ..echodistill_core.errors import InputError
from ..echodistill_core.evaluation.metrics import PROTOCOLS
from ..echodistill_core.evaluation.pictures import score_pictures
from ..echodistill_core.perception.load import BackboneFiles
from .bridge.backbones import search_backbones
from .bridge.node_text import set_status, shown_on_node
from .bridge.pictures import unit_of
from .bridge.sockets import Concept, ConceptSocket
from .bridge.widgets import schema

TITLES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}


class ScoreEcho(io.ComfyNode):
    """Computes prompt fidelity (CLIP-T) and subject fidelity (CLIP-I, DINO)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        titles = "; ".join(f"{name}: {protocol.title}" for name, protocol in PROTOCOLS.items())
        return schema(
            node_id="ScoreEcho",
            display_name="Score Echo",
            search_aliases=("clip score", "dino", "similarity", "metrics", "subject fidelity", "evaluate"),
            description=(
                "CLIP-T (prompt fidelity), CLIP-I and DINO (subject fidelity), each a mean cosine similarity. Only "
                "scores of the same protocol are comparable."
            ),
            inputs=[
                io.Image.Input("images", tooltip="Pictures generated from one prompt."),
                ConceptSocket.Input("concept", tooltip="The photographs to compare with."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The prompt of the pictures."),
                io.Combo.Input(
                    "protocol",
                    options=list(PROTOCOLS),
                    default="dreambooth",
                    tooltip=f"Which encoders are used. {titles}.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The scores as text."),
                io.Float.Output(display_name="clip_t", tooltip="Prompt fidelity by CLIP; NaN without its encoder."),
                io.Float.Output(display_name="clip_i", tooltip="Subject fidelity by CLIP; NaN without its encoder."),
                io.Float.Output(display_name="dino", tooltip="Subject fidelity by DINO; NaN without its encoder."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(cls, images: Any, concept: Concept, prompt: str, protocol: str) -> io.NodeOutput:
        """Return the scores as text and as numbers."""
        chosen = PROTOCOLS[protocol]
        backbone_files: dict[str, BackboneFiles] = {}
        missing = ""
        if protocol != "miniature":
            backbone_files, missing = search_backbones([chosen.clip, chosen.dino])
            if not backbone_files:
                raise InputError(missing)
        scores = score_pictures(
            unit_of(images), concept.photographs, prompt, concept.placeholder, chosen, backbone_files
        )
        text = "\n".join([*(f"{TITLES[name]} {value:.3f}" for name, value in scores.items()), *filter(None, [missing])])
        set_status(cls.hidden.unique_id, text)
        values = [scores.get(name, math.nan) for name in TITLES]
        return io.NodeOutput(text, *values, ui=ui.PreviewText(text))
