"""Every setting of a run, once: its default, range, unit and reason. Flags and node widgets are made from it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import InputError
from .messages import quoted

T = TypeVar("T")


def setting(
    default: Any,
    reason: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Collection[str] = (),
    affects_result: bool = True,
) -> Any:
    """Declare one field: `low` and `high` are inclusive; `affects_result` says whether it enters the fingerprint.

    choices: the values allowed; a Registry as of the time of the check.
    """
    metadata = {
        "reason": reason,
        "unit": unit,
        "low": low,
        "high": high,
        "choices": choices,
        "affects_result": affects_result,
    }
    return field(default=default, metadata=metadata)


TRAINABLE = ("token", "kv", "kv+token", "lora", "lora+token", "full", "full+token")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the distillation stage. The defaults are the paper's; `preset` names the differences.

    Raises InputError for a value of the wrong type or outside its range.
    """

    preset: str = setting("paper", "named set of defaults; explicit settings win over it", choices=("paper", "tuned"))

    # The concept
    class_noun: str = setting("", "what the photographs show, in one or a few words: dog, coffee mug")
    placeholder: str = setting("<new1>", "the new word that will mean this very subject")
    vectors: int = setting(
        1, "embedding rows behind the placeholder; more hold more detail and eat prompt", unit="tokens", low=1, high=16
    )
    crop: str = setting(
        "center", "how a photograph becomes square: cut the middle, or squash", choices=("center", "squash")
    )
    max_photographs: int = setting(
        0, "use only the first so many photographs; 0 uses all, 1 is the paper's one-shot test", low=0
    )
    augment: bool = setting(
        True, "shrink onto a grey canvas or enlarge, with a caption that says so (Custom Diffusion)"
    )
    flip: bool = setting(True, "mirror half of the draws; turn off for subjects with writing on them")

    # The run
    iterations: int = setting(1000, "iterations of the distillation stage; the paper's 1000", low=1)
    batch_size: int = setting(2, "images per iteration for each model; the paper's 2", unit="images", low=1)
    resolution: int = setting(
        0, "side of the training images; 0 takes the family's own (512 for Stable Diffusion)", unit="pixels", low=0
    )
    seed: int = setting(0, "of every random number in the run", low=0, high=2**63 - 1)

    # What learns
    trainable: str = setting(
        "kv+token",
        "cross-attention keys and values and the token; the other choices are the paper's baselines",
        choices=TRAINABLE,
    )
    lora_rank: int = setting(16, "rank of the updates when `trainable` is lora", low=1, high=1024)
    teacher_lr: float = setting(1e-5, "learning rate of the teacher's weights", low=0.0, high=1.0)
    student_lr: float = setting(2e-5, "learning rate of the student's weights", low=0.0, high=1.0)
    token_lr: float = setting(
        1e-5, "learning rate of the placeholder's rows, which learn beside the teacher", low=0.0, high=1.0
    )
    critic_lr: float = setting(1e-4, "learning rate of the critics' heads", low=0.0, high=1.0)
    weight_decay: float = setting(1e-2, "AdamW's decoupled weight decay, on every trained tensor", low=0.0, high=1.0)
    lr_decay: str = setting(
        "constant",
        "the course of every learning rate over a stage; cosine lets it fall to zero, so that the last steps settle",
        choices=("constant", "cosine"),
    )
    grad_clip: float = setting(1.0, "largest gradient norm of teacher and student; 0 turns clipping off", low=0.0)
    critic_grad_clip: float = setting(
        0.0, "largest gradient norm of the critics; 0 off, as in effect in the reference", low=0.0
    )
    share_text_encoder: bool = setting(
        True, "the student reads the teacher's token and may not change it; off gives it a token of its own"
    )

    # The terms of the losses; a weight of 0 removes the term and its cost
    teacher_weight: float = setting(1.0, "Eq. 1: the teacher learns the photographs; 0 freezes it", low=0.0)
    student_reconstruction_weight: float = setting(
        0.0, "Eq. 1 applied to the one-step student: the baselines' whole loss, no part of EchoDistill", low=0.0
    )
    prior_weight: float = setting(
        0.0, "Eq. 1 on images of the class, beside Eq. 1 on the photographs (DreamBooth's prior preservation)", low=0.0
    )
    prior_images: int = setting(
        100, "images of the class that a model makes of itself, once, where prior_weight is on", unit="images", low=1
    )
    alignment_weight: float = setting(
        1.0, "Eq. 5: the student follows the teacher; 0 with teacher_weight 0 is 'no teacher'", low=0.0
    )
    identity_weight: float = setting(1.0, "Eq. 2: CLIP tokens of both images agree", low=0.0)
    mse_weight: float = setting(1.0, "Eq. 3: latents of both agree", low=0.0)
    swd_weight: float = setting(0.1, "Eq. 4: multi-scale sliced Wasserstein distance of both images", low=0.0)
    adversarial_weight: float = setting(1.0, "Eq. 6: the student's image passes for a photograph", low=0.0)
    dino_weight: float = setting(1.0, "the DINO v1 critic's share in Eq. 6", low=0.0)
    dinov2_weight: float = setting(1.0, "the DINO v2 critic's share in Eq. 6", low=0.0)
    dinov2_backbone: str = setting(
        "dinov2",
        "ViT-L/14 at 518 as in the paper, or ViT-S/14 at 224 for a hundredth of its cost",
        choices=("dinov2", "dinov2-small"),
    )
    clip_weight: float = setting(1.0, "the CLIP critic's share in Eq. 6", low=0.0)
    image_every: int = setting(
        1,
        "iterations from one comparison of images to the next: Eq. 2, 4, 6 and 7 are in the loss, and cost, only then; "
        "Eq. 3, of latents, is in each",
        unit="iterations",
        low=1,
    )
    critic_every: int = setting(
        1,
        "comparisons of images from one turn of the critics to the next: Eq. 6 and Eq. 7 are in the loss only then",
        unit="comparisons",
        low=1,
    )
    alignment_by_t: bool = setting(
        True, "weigh alignment by c(t) = abar_t (ADD's exponential weight); off weighs all timesteps alike"
    )
    guidance_scale: float = setting(7.5, "classifier-free guidance of the teacher in the alignment", low=1.0, high=50.0)
    swd_levels: int = setting(
        5, "levels of MS-SWD's Gaussian pyramid, as far as the image is large enough", low=1, high=10
    )
    swd_projections: int = setting(128, "random projections of MS-SWD, drawn anew every call", low=1, high=4096)

    # Where the reference departs from the works it cites: the defaults keep its behaviour, the other values mend it
    swd_unit_range: bool = setting(False, "give MS-SWD sRGB in [0,1] as it expects; the reference gives [-1,1]")
    backbone_normalisation: bool = setting(
        False, "give each frozen backbone its own mean and deviation; the reference gives [-1,1]"
    )
    critic_canvas: bool = setting(
        True, "critics see shrunken photographs with their grey canvas as real, as in the reference"
    )

    # How it computes
    precision: str = setting(
        "fp32", "bf16 halves memory on recent GPUs; what is trained stays fp32", choices=PRECISIONS
    )
    memory_mode: str = setting(
        "normal",
        "fits smaller GPUs when low: one image and one UNet at a time, activations made again; more time, the same "
        "result but for rounding",
        choices=("normal", "low"),
        affects_result=False,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", affects_result=False)

    # What is written while it runs
    log_every: int = setting(
        10, "iterations between log lines, when losses are also checked for NaN", low=1, affects_result=False
    )
    checkpoint_every: int = setting(
        100, "iterations between checkpoints; a killed run loses at most so many", low=1, affects_result=False
    )
    preview_every: int = setting(
        100, "iterations between contact sheets of one-step samples; 0 for none", low=0, affects_result=False
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def critic_weights(self) -> dict[str, float]:
        """The critics that are on, by backbone name, with their shares in Eq. 6. Empty without an adversarial term."""
        weights = {"dino": self.dino_weight, "dinov2": self.dinov2_weight, "clip": self.clip_weight}
        return {name: w for name, w in weights.items() if w > 0} if self.adversarial_weight > 0 else {}

    @property
    def aligns(self) -> bool:
        """Whether any alignment term is on, and with it the teacher's pass in the student's step."""
        return self.alignment_weight > 0 and max(self.identity_weight, self.mse_weight, self.swd_weight) > 0

    @property
    def teaches(self) -> bool:
        """Whether the teacher itself learns (Eq. 1)."""
        return self.teacher_weight > 0

    @property
    def reconstructing_roles(self) -> tuple[str, ...]:
        """The roles that learn by reconstruction (Eq. 1), in the order of an iteration."""
        weights = {"teacher": self.teacher_weight, "student": self.student_reconstruction_weight}
        return tuple(role for role, weight in weights.items() if weight > 0)

    @property
    def prior_roles(self) -> tuple[str, ...]:
        """The roles that learn by reconstruction with prior preservation. A token alone is in no caption of a class."""
        if self.prior_weight == 0 or self.trainable == "token":
            return ()
        return self.reconstructing_roles

    @property
    def period(self) -> int:
        """Iterations after which the turns of images and critics come again."""
        return self.image_every * self.critic_every

    @property
    def generates(self) -> bool:
        """Whether an iteration needs an image from the student."""
        return self.aligns or bool(self.critic_weights)


@dataclass(frozen=True, kw_only=True)
class EchoSettings:
    """Settings of the echoing stage. Everything else carries on from the distillation stage.

    Raises InputError for a value of the wrong type or outside its range.
    """

    iterations: int = setting(500, "iterations of the echoing stage", low=1)
    pool_size: int = setting(
        64, "images that the student makes, once, as the new training images", unit="images", low=1
    )
    prompts: str = setting("", "prompts of the pool, separated by |; empty takes the training prompts")
    real_share: float = setting(
        0.0, "share of draws that still come from the photographs; the paper replaces them all", low=0.0, high=1.0
    )
    carry_optimizers: bool = setting(True, "go on with the optimisers' moments; off starts them anew")
    carry_critics: bool = setting(True, "go on with the critics; off starts their heads anew")

    def __post_init__(self) -> None:
        check_fields(self)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # 56 % of the operations, and in the miniature as good within the intervals but for CLIP-I (docs/results.md):
    # images, which have to be decoded, in every third iteration, and backbones that see what they were trained on.
    "tuned": {"backbone_normalisation": True, "image_every": 3},
}


def check_fields(settings: Any) -> None:
    """Raise InputError naming the first field of a settings dataclass with a wrong type, range or choice."""
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, meta = getattr(settings, f.name), f.metadata
        expected = hints[f.name]
        right_type = isinstance(value, (int, float) if expected is float else expected)
        if not right_type or (isinstance(value, bool) and expected is not bool):
            raise InputError(f"setting {f.name} is {quoted(value)}; expected {expected.__name__}.")
        if meta["choices"] and value not in meta["choices"]:
            choices = meta["choices"]
            raise InputError(
                f"setting {f.name} is {quoted(value)}; expected one of {', '.join(choices)}{nearest(value, choices)}."
            )
        low, high = meta["low"], meta["high"]
        if low is None:
            continue
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            raise InputError(
                f"setting {f.name} is {value}; expected {wanted}{' ' + meta['unit'] if meta['unit'] else ''}."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, or an empty string where nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def from_options(cls: type[T], options: Mapping[str, Any], recommended: Mapping[str, Any] | None = None) -> T:
    """Build a settings dataclass: explicit options over its preset over what is recommended over its defaults.

    recommended: values for the models at hand (models.sources.settings_for). A preset names a few differences on
        purpose and so wins over them; where it says nothing, they hold.
    Raises InputError for a name that is no setting, suggesting the nearest, and for values that do not fit.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in (*options, *(recommended or {})):
        if name not in known:
            raise InputError(f"there is no setting {quoted(name)}{nearest(name, known)}.")
    preset = PRESETS.get(str(options.get("preset", "paper")), {}) if "preset" in known else {}
    return cls(**{**(recommended or {}), **preset, **options})


def affecting_result(settings: Any) -> dict[str, Any]:
    """The fields that determine a run's result, by name. The preset's name is left out: its values are there."""
    return {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.metadata["affects_result"] and f.name != "preset"
    }
