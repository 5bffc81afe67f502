"""Which checkpoints a run uses: a named family, or files and folders of the user's own in place of its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..settings import check_fields, setting


@dataclass(frozen=True)
class NamedFamily:
    """A family by the names of its parts in models.hub. bundle: what to download to have it, or "" for nothing."""

    teacher: str
    student: str
    student_lora: str = ""
    bundle: str = ""


FAMILIES: dict[str, NamedFamily] = {
    "sd-turbo": NamedFamily("sd2.1", "sd-turbo", bundle="sd-turbo-family"),
    "sd-turbo-base": NamedFamily("sd2.1-base", "sd-turbo", bundle="sd-turbo-base-family"),
    "hyper-sd15": NamedFamily("sd1.5", "sd1.5", "hyper-sd15", bundle="hyper-sd15-family"),
    "tiny": NamedFamily("tiny", "tiny"),
}

_PREDICTIONS = ("auto", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True)
class ModelSources:
    """Where the models come from. Raises InputError for a value that does not fit."""

    family: str = setting(
        "sd-turbo", "teacher and student by one name; tiny is random and needs no download", choices=tuple(FAMILIES)
    )
    teacher: str = setting("", "teacher's diffusers folder or .safetensors file, in place of the family's")
    student: str = setting("", "student's diffusers folder or .safetensors file, in place of the family's")
    student_lora: str = setting("", "LoRA that makes the student one-step (Hyper-SD), merged into it")
    teacher_prediction: str = setting(
        "auto", "what the teacher predicts, where its file does not say", choices=_PREDICTIONS
    )
    student_prediction: str = setting(
        "auto", "what the student predicts, where its file does not say", choices=_PREDICTIONS
    )
    backbones: str = setting("", "folder with the frozen backbones dino, dinov2, clip; empty looks in the hub cache")

    def __post_init__(self) -> None:
        check_fields(self)

    def absolute(self) -> ModelSources:
        """The same with paths that exist made absolute, so that a run finds its models from any folder."""
        paths = {n: getattr(self, n) for n in ("teacher", "student", "student_lora", "backbones")}
        return replace(self, **{n: str(Path(p).resolve()) for n, p in paths.items() if p and Path(p).exists()})


def backbone_source(sources: ModelSources) -> str:
    """Where perception.load looks for backbones: the user's folder, "tiny" for the tiny family, or the hub cache."""
    return sources.backbones or ("tiny" if sources.family == "tiny" else "")
