"""Which checkpoints a run uses: a named family, or files and folders of the user's own in place of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..settings import EchoSettings, TrainSettings, check_fields, from_options, setting
from .architectures import MINIATURE, SD2, Architecture

T = TypeVar("T")


@dataclass(frozen=True)
class NamedFamily:
    """A family by the names of its parts in models.hub.

    bundle: what to download to have it, or "" for nothing.
    defaults, echo_defaults: values of TrainSettings and EchoSettings that suit its networks better than the paper's,
        which were found for Stable Diffusion; `settings_for` says what wins over them.
    """

    teacher: str
    student: str
    student_lora: str = ""
    bundle: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    echo_defaults: Mapping[str, Any] = field(default_factory=dict)


CUSTOM = "custom"  # models without a name here: the user says where they are

FAMILIES: dict[str, NamedFamily] = {
    "sd-turbo": NamedFamily("sd2.1", "sd-turbo", bundle="sd-turbo-family"),
    "sd-turbo-base": NamedFamily("sd2.1-base", "sd-turbo", bundle="sd-turbo-base-family"),
    "hyper-sd15": NamedFamily("sd1.5", "sd1.5", "hyper-sd15", bundle="hyper-sd15-family"),
    "miniature": NamedFamily(
        "miniature",
        "miniature",
        # Networks hundreds of times smaller than Stable Diffusion's want larger steps and fewer of them; most of what
        # a subject is goes into the token, since their keys and values are narrow.
        defaults={
            "iterations": 200,
            "teacher_lr": 2e-4,
            "student_lr": 5e-4,
            "token_lr": 1e-1,
            "critic_lr": 1e-4,
            "guidance_scale": 3.0,
            # Their world has no grey canvas, and at 64 pixels a subject made smaller loses its marks.
            "augment": False,
            # An eighth of the sorting, which costs a third of an iteration on a CPU at 128.
            "swd_projections": 16,
        },
        echo_defaults={"iterations": 80},
    ),
    "tiny": NamedFamily("tiny", "tiny"),
    CUSTOM: NamedFamily("", ""),
}


def family_name(architecture: Architecture, teacher_prediction: str | None) -> str:
    """The family's name that models belong to, as far as architecture and prediction tell; CUSTOM for all others.

    teacher_prediction: what the teacher predicts, or None where there is no teacher.
    """
    if architecture.name == MINIATURE.name:
        return "miniature"
    if architecture.text_width == SD2.text_width and architecture.unet["in_channels"] == SD2.unet["in_channels"]:
        return "sd-turbo-base" if teacher_prediction == "epsilon" else "sd-turbo"
    return CUSTOM


_PREDICTIONS = ("auto", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True)
class ModelSources:
    """Where the models come from. Raises InputError for a value that does not fit."""

    family: str = setting(
        "sd-turbo",
        "teacher and student by one name; miniature comes with the package, tiny is random, custom has --student and "
        "--teacher",
        choices=tuple(FAMILIES),
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

    def check_named(self) -> None:
        """Raise InputError where the family is custom and no student is named."""
        if self.family == CUSTOM and not self.student:
            raise InputError(
                "the family custom has no models of its own; name those that the run or adapter was trained on with "
                "--student and --teacher."
            )

    def absolute(self) -> ModelSources:
        """The same with paths that exist made absolute, so that a run finds its models from any folder."""
        paths = {n: getattr(self, n) for n in ("teacher", "student", "student_lora", "backbones")}
        return replace(self, **{n: str(Path(p).resolve()) for n, p in paths.items() if p and Path(p).exists()})


def backbone_source(sources: ModelSources) -> str:
    """Where perception.load looks for backbones: the user's folder, the family's own by its name, or the hub cache."""
    return sources.backbones or (sources.family if sources.family in ("miniature", "tiny") else "")


def settings_for(cls: type[T], options: Mapping[str, Any], sources: ModelSources) -> T:
    """TrainSettings or EchoSettings for these models: options over the preset over the family's over the defaults.

    What comes back names every value, so a run that stores it does not depend on the family's table.
    Raises InputError for a name that is no setting and for values that do not fit.
    """
    family = FAMILIES[sources.family]
    recommended: dict[type, Mapping[str, Any]] = {TrainSettings: family.defaults, EchoSettings: family.echo_defaults}
    return from_options(cls, options, recommended.get(cls))
