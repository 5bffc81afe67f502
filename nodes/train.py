"""EchoDistillTrain: the distillation stage. Inputs: models and a concept; outputs: a run and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
from comfy_api.latest import io, ui

from ..echodistill_core.concept.images import square_images
from ..echodistill_core.errors import DamagedRunError
from ..echodistill_core.miniature.concepts import outside_domain_warning
from ..echodistill_core.models.sources import ModelSources, settings_for
from ..echodistill_core.reporting import RunPictures
from ..echodistill_core.settings import TrainSettings
from ..echodistill_core.training import session
from ..echodistill_core.training.identity import fingerprint_of, inputs_identity
from ..echodistill_core.training.run import Run, open_run
from .bridge import roles, training
from .bridge.fit import identity_of
from .bridge.kinds import architecture_of, sources_of
from .bridge.memory import default_precision
from .bridge.node_text import note, set_status, shown_on_node
from .bridge.paths import run_folder
from .bridge.progress import NodeProgress, combine_listeners
from .bridge.sockets import AdapterSocket, Concept, ConceptSocket, Models, RunSocket, TrainedRun
from .bridge.widgets import advanced, advanced_widgets, chosen, schema, widget

# Set by the concept, by this node's basic widgets, or by the device.
_NOT_ADVANCED = frozenset(
    {
        *("class_noun", "placeholder", "crop"),
        *("iterations", "batch_size", "seed", "preset", "preview_every"),
        *("log_every", "device", "memory_mode"),
        *("extra_losses", "extra_critics"),  # of parts that Python code registers
    }
)


class EchoDistillTrain(io.ComfyNode):
    """Trains teacher and one-step student on the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="EchoDistillTrain",
            display_name="Train EchoDistill",
            search_aliases=(
                "dreambooth",
                "custom diffusion",
                "textual inversion",
                "personalize",
                "personalise",
                "fine-tune",
                "finetune",
                "train lora",
                "subject",
                "sd-turbo",
                "one step",
                "turbo",
            ),
            description=(
                "Trains a multi-step teacher and a one-step student on one subject. The run is kept in "
                "output/echodistill: the same inputs resume it, or return it if it is finished."
            ),
            inputs=[
                io.Model.Input("student", tooltip="The one-step model: SD-Turbo."),
                io.Model.Input("teacher", tooltip="The multi-step model that the student is distilled from: SD 2.1."),
                io.Clip.Input("clip", tooltip="The text encoder; the teacher's if the two models have different ones."),
                io.Vae.Input("vae", tooltip="The student's VAE."),
                ConceptSocket.Input("concept", tooltip="From Load Reference Images."),
                widget(TrainSettings, "iterations"),
                widget(TrainSettings, "batch_size"),
                # A new seed starts a new training, so the front end must not change it by itself.
                widget(TrainSettings, "seed", control_after_generate=False),
                widget(TrainSettings, "preset"),
                widget(TrainSettings, "memory_mode"),
                widget(
                    TrainSettings, "preview_every", min=1, tooltip="Iterations between one-step samples on the node."
                ),
                *advanced_widgets(TrainSettings, without=_NOT_ADVANCED),
                advanced(
                    io.Boolean.Input(
                        "check_roles",
                        default=True,
                        tooltip="Stop before training if student and teacher seem to be swapped.",
                    )
                ),
            ],
            outputs=[
                RunSocket.Output(display_name="run", tooltip="For the Echo stage."),
                AdapterSocket.Output(display_name="adapter", tooltip="For Load Echo Adapter and Save Echo Adapter."),
                io.Image.Output(display_name="samples", tooltip="One-step samples during training, first to last."),
                io.Image.Output(display_name="losses", tooltip="Plot of every loss term over the iterations."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(
        cls,
        student: Any,
        teacher: Any,
        clip: Any,
        vae: Any,
        concept: Concept,
        preset: str,
        check_roles: bool = True,
        **values: Any,
    ) -> io.NodeOutput:
        """Start the training, resume it, or return the finished run."""
        models, node = Models(student, teacher, clip, vae), cls.hidden.unique_id
        sources = sources_of(models)
        options = {
            "precision": default_precision(mm.get_torch_device()),
            **chosen(values),
            "preset": preset,
            "class_noun": concept.class_noun,
            "placeholder": concept.placeholder,
            "crop": concept.crop,
            "device": str(mm.get_torch_device()),
        }
        settings = settings_for(TrainSettings, options, sources)
        size = settings.resolution or architecture_of(student).resolution
        images = square_images(concept.photographs[: settings.max_photographs or None], size, settings.crop)
        identity = {
            **inputs_identity(settings, images),
            **identity_of(models),
        }
        folder = run_folder(concept.class_noun, fingerprint_of(identity))
        run = _known_run(folder)
        _note_unsupported_photographs(sources, concept)
        if run is None or not run.is_finished("distil"):
            roles.check_roles(models, stop=check_roles)
            backbone_files = training.backbone_files_of(settings, sources)
            with training.family_on_device(models, settings, size, backbone_files, node) as family:
                listen = combine_listeners(RunPictures(folder), NodeProgress(node, "distil", settings.iterations))
                run = session.train(
                    concept.photographs, family, settings, sources, folder, listen, backbone_files=backbone_files
                )
        return _output(cls, TrainedRun(run, models, settings.memory_mode))


def _note_unsupported_photographs(sources: ModelSources, concept: Concept) -> None:
    """Show a note if the miniature cannot learn the concept: real photographs, or an unknown class noun."""
    if sources.family == "miniature":
        text = outside_domain_warning(concept.photographs, concept.class_noun)
        if text:
            note(text)


def _known_run(folder: Path) -> Run | None:
    try:
        return open_run(folder) if (folder / "run.json").is_file() else None
    except DamagedRunError as error:
        note(str(error))
        return None  # training writes a new run.json


def _output(cls: type[io.ComfyNode], trained: TrainedRun) -> io.NodeOutput:
    run = trained.run
    samples = training.samples_of(run, "distil")
    set_status(cls.hidden.unique_id, training.summary(run, "distil"))
    return io.NodeOutput(
        trained,
        training.adapters_of(run, "distil"),
        samples,
        training.losses_of(run, "distil"),
        ui=ui.PreviewImage(samples, cls=cls),
    )
