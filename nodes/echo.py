"""EchoStage: student and teacher are trained further on images that the student generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management as mm
from comfy_api.latest import io, ui

from ..echodistill_core.models.sources import settings_for
from ..echodistill_core.reporting import RunPictures
from ..echodistill_core.settings import EchoSettings
from ..echodistill_core.training import session
from ..echodistill_core.training.fork import fork_for_echo
from .bridge import training
from .bridge.node_text import set_status, shown_on_node
from .bridge.pictures import image_of_files
from .bridge.progress import NodeProgress, combine_listeners
from .bridge.sockets import AdapterSocket, RunSocket, TrainedRun
from .bridge.widgets import advanced_widgets, chosen, schema, widget

_NOT_ADVANCED = frozenset({"iterations", "pool_size", "prompts", "real_share"})


class EchoStage(io.ComfyNode):
    """Takes a trained run and returns the echoed run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="EchoStage",
            display_name="Echo Stage",
            search_aliases=("self-training", "distill", "personalize", "echo distill", "fine-tune"),
            description="The student generates a pool of images, and both models are trained further on it.",
            inputs=[
                RunSocket.Input("trained", tooltip="From Train EchoDistill."),
                widget(EchoSettings, "iterations"),
                widget(EchoSettings, "pool_size", max=1000),
                widget(
                    EchoSettings,
                    "prompts",
                    multiline=True,
                    tooltip="Prompts of the pool, one per line, with the placeholder; empty: the training prompts.",
                ),
                widget(EchoSettings, "real_share"),
                *advanced_widgets(EchoSettings, without=_NOT_ADVANCED),
            ],
            outputs=[
                RunSocket.Output(display_name="run", tooltip="The echoed run."),
                AdapterSocket.Output(display_name="adapter", tooltip="For Load Echo Adapter and Save Echo Adapter."),
                io.Image.Output(display_name="samples", tooltip="One-step samples through the stage, first to last."),
                io.Image.Output(display_name="pool", tooltip="The images that the student generated for this stage."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(cls, trained: TrainedRun, prompts: str, **values: Any) -> io.NodeOutput:
        """Start the echo, resume it, or return the finished run."""
        node, models, distil = cls.hidden.unique_id, trained.models, trained.run
        joined = " | ".join(line.strip() for line in prompts.splitlines() if line.strip())
        settings = settings_for(EchoSettings, {**chosen(values), "prompts": joined}, distil.sources)
        run = fork_for_echo(distil, settings)
        if not run.is_finished("echo"):
            # Device and memory mode may differ from those of the first stage.
            run.record["settings"] |= {
                "device": str(mm.get_torch_device()),
                "memory_mode": trained.memory_mode,
            }
            backbone_files = training.backbone_files_of(run.settings, run.sources)
            with training.family_on_device(models, run.settings, run.resolution, backbone_files, node) as family:
                listen = combine_listeners(RunPictures(run.folder), NodeProgress(node, "echo", settings.iterations))
                run = session.echo(run, family, settings, listen, backbone_files)
        pool = image_of_files(sorted(run.path("echo", "pool").glob("*.png")))
        set_status(node, training.summary(run, "echo"))
        return io.NodeOutput(
            replace(trained, run=run),
            training.adapters_of(run, "echo"),
            training.samples_of(run, "echo"),
            pool,
            ui=ui.PreviewImage(pool, cls=cls),
        )
