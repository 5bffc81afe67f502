"""Which checkpoints a run uses: a registered family, with any part replaced by the user's own files and folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..registry import Registry
from ..settings import EchoSettings, TrainSettings, check_fields, from_options, setting
from .architectures import SD2, Architecture

T = TypeVar("T")


@dataclass(frozen=True)
class NamedFamily:
    """A family: its checkpoints and the settings recommended for them. Register it in `FAMILIES` by its name.

    teacher, student, student_lora: each a name in models.hub.HUB, or the path of a local diffusers folder or
        .safetensors file; "miniature" and "tiny" for the package's own models. student_lora: a LoRA that is merged into
        the student (Hyper-SD), or "" for none.
    bundle: the argument of `echodistill download` that fetches the family, or "" where nothing has to be fetched.
    teacher_prediction: prediction type of a teacher whose weights do not tell it (diffusion.PREDICTION_TYPES).
    backbones: as `source` of perception.load.load_backbones: "tiny", "miniature", a folder, or "" for the hub cache.
    architecture: a name in models.architectures.ARCHITECTURES that belongs to this family alone, or "".
    defaults, echo_defaults: recommended values of TrainSettings and EchoSettings where the paper's, which were found
        for Stable Diffusion, do not suit; `settings_for` gives the order of precedence.
    """

    teacher: str
    student: str
    student_lora: str = ""
    bundle: str = ""
    teacher_prediction: str = "auto"
    backbones: str = ""
    architecture: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    echo_defaults: Mapping[str, Any] = field(default_factory=dict)


CUSTOM = "custom"  # models without a registered name; the user gives their paths

_FAMILIES = {
    "sd-turbo": NamedFamily("sd2.1", "sd-turbo", bundle="sd-turbo-family"),
    "sd-turbo-base": NamedFamily("sd2.1-base", "sd-turbo", bundle="sd-turbo-base-family"),
    "hyper-sd15": NamedFamily("sd1.5", "sd1.5", "hyper-sd15", bundle="hyper-sd15-family"),
    "miniature": NamedFamily(
        "miniature",
        "miniature",
        backbones="miniature",
        architecture="miniature",
        # Networks hundreds of times smaller than Stable Diffusion's need fewer, larger steps. The token learns most of
        # the subject, since the keys and values are narrow: hence its high learning rate.
        defaults={
            "iterations": 200,
            "teacher_lr": 2e-4,
            "student_lr": 5e-4,
            "token_lr": 1e-1,
            "critic_lr": 1e-4,
            "guidance_scale": 3.0,
            # The training images have no grey canvas, and at 64 pixels a smaller subject loses its details.
            "augment": False,
            # With 128 projections, sorting takes a third of an iteration on a CPU.
            "swd_projections": 16,
        },
        echo_defaults={"iterations": 80},
    ),
    # As SD 2.1; random weights do not tell the prediction type.
    "tiny": NamedFamily("tiny", "tiny", teacher_prediction="v_prediction", backbones="tiny"),
    CUSTOM: NamedFamily("", ""),
}
FAMILIES: Registry[NamedFamily] = Registry("family", _FAMILIES)


def family_name(architecture: Architecture, teacher_prediction: str | None) -> str:
    """Name in FAMILIES of models with this architecture and prediction type; CUSTOM where it is ambiguous.

    teacher_prediction: the teacher's prediction type, or None where there is no teacher.
    """
    for name, family in FAMILIES.items():
        if family.architecture == architecture.name:
            return name
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
        choices=FAMILIES,
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
    """`source` for perception.load.load_backbones: the user's folder, else the family's own, else the hub cache."""
    return sources.backbones or FAMILIES[sources.family].backbones


def settings_for(cls: type[T], options: Mapping[str, Any], sources: ModelSources) -> T:
    """TrainSettings or EchoSettings for these models.

    Precedence, highest first: options, the preset, the family's recommendations, the class's defaults. Every value of
    the result is explicit, so a run that stores it does not depend on FAMILIES.
    Raises InputError for a name that is no setting and for values that do not fit.
    """
    family = FAMILIES[sources.family]
    recommended: dict[type, Mapping[str, Any]] = {TrainSettings: family.defaults, EchoSettings: family.echo_defaults}
    return from_options(cls, options, recommended.get(cls))
