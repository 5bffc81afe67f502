"""Builds a family of the core from ComfyUI's MODEL, CLIP and VAE; training it leaves the user's objects unchanged."""

from __future__ import annotations

from ...echodistill_core.errors import InputError
from ...echodistill_core.models.family import Family
from ...echodistill_core.models.load import load_family
from .kinds import prediction_of, sources_of
from .sockets import Models
from .weights import UNET_PREFIX, network_tensors, text_prefix


def build_family(models: Models) -> tuple[Family, list[str]]:
    """A family built from copies of the user's weights, and notes about patches that were merged or ignored.

    Training the family leaves the user's objects unchanged.
    Raises InputError for models of other families, and if the parts do not fit each other.
    """
    clip = models.clip
    if clip.layer_idx is not None:
        raise InputError(
            f"the CLIP stops at layer {clip.layer_idx} (CLIP Set Last Layer); training reads the layer that the models "
            "were made with: connect the CLIP without that node."
        )
    parts = {
        "student": network_tensors(models.student, UNET_PREFIX),
        "teacher": network_tensors(models.teacher, UNET_PREFIX),
        "CLIP": network_tensors(clip.patcher, text_prefix(clip)),
        "VAE": network_tensors(models.vae.patcher),
    }
    sources = sources_of(models)
    licence = "MIT" if sources.family == "miniature" else "that of the checkpoints that were connected"
    family = load_family(
        {"unet": parts["student"].tensors, "vae": parts["VAE"].tensors},
        {"unet": parts["teacher"].tensors, "text_encoder": parts["CLIP"].tensors},
        name=sources.family,
        student_prediction=prediction_of(models.student, "student"),
        teacher_prediction=prediction_of(models.teacher, "teacher"),
        licences={"student": licence, "teacher": licence},
    )
    notes = [
        f"{part.patched} weights of the {name} were copied with their patches (LoRAs) merged in"
        for name, part in parts.items()
        if part.patched
    ]
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        ignored = sorted(k for k, v in model.model_options.get("transformer_options", {}).items() if v)
        if ignored:
            notes.append(f"options that change the {name} only while sampling were ignored: {', '.join(ignored)}")
    return family, [*notes, *family.warnings]
