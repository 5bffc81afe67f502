"""All settings of a run with default, range, unit and reason. CLI flags and node widgets are generated from them."""

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
    omit_default: bool = False,
) -> Any:
    """Declare one field: `low` and `high` are inclusive; `affects_result` says whether it enters the fingerprint.

    omit_default: leave the field out of the fingerprint at its default. For fields that are newer than the first
    runs, whose fingerprints must stay as they are.
    choices: the values allowed; a Registry as of the time of the check.
    """
    metadata = {
        "reason": reason,
        "unit": unit,
        "low": low,
        "high": high,
        "choices": choices,
        "affects_result": affects_result,
        "omit_default": omit_default,
    }
    return field(default=default, metadata=metadata)


TRAINABLE = ("token", "kv", "kv+token", "lora", "lora+token", "full", "full+token")
PRECISIONS = ("fp32", "bf16")
CRITICS = ("dino", "dinov2", "clip")  # the paper's, each with a setting <critic>_weight


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the distillation stage. The defaults are those of the paper; a `preset` replaces some of them.

    Raises InputError for a value of the wrong type or outside its range.
    """

    preset: str = setting(
        "paper", "named set of defaults; settings given explicitly win over it", choices=("paper", "tuned")
    )

    # The concept
    class_noun: str = setting("", "class of the subject in one or a few words, such as dog or coffee mug")
    placeholder: str = setting("<new1>", "new word that stands for the subject in prompts")
    vectors: int = setting(
        1,
        "embedding vectors of the placeholder; more hold more detail and use up more of the prompt's 77 tokens",
        unit="tokens",
        low=1,
        high=16,
    )
    crop: str = setting(
        "center",
        "how photographs are made square: center crops the middle, squash changes the aspect ratio",
        choices=("center", "squash"),
    )
    max_photographs: int = setting(
        0, "number of photographs to use, from the first on; 0 uses all, 1 is the paper's one-shot test", low=0
    )
    augment: bool = setting(
        True,
        "random resizing as in Custom Diffusion: shrink onto a grey canvas or enlarge, with captions to match",
    )
    flip: bool = setting(True, "mirror training images with probability 0.5; turn off for subjects with text on them")

    # The run
    iterations: int = setting(1000, "iterations of the distillation stage; the paper uses 1000", low=1)
    batch_size: int = setting(2, "images per iteration for each model; the paper uses 2", unit="images", low=1)
    resolution: int = setting(
        0,
        "side of the training images; 0 uses the family's resolution (512 for Stable Diffusion)",
        unit="pixels",
        low=0,
    )
    seed: int = setting(0, "seed of all random numbers in the run", low=0, high=2**63 - 1)

    # What learns
    trainable: str = setting(
        "kv+token",
        "weights to train: kv+token trains cross-attention keys and values and the token; the others are baselines",
        choices=TRAINABLE,
    )
    lora_rank: int = setting(16, "rank of the low-rank updates where trainable is lora or lora+token", low=1, high=1024)
    teacher_lr: float = setting(1e-5, "learning rate of the teacher's weights", low=0.0, high=1.0)
    student_lr: float = setting(2e-5, "learning rate of the student's weights", low=0.0, high=1.0)
    token_lr: float = setting(
        1e-5,
        "learning rate of the placeholder's embedding vectors, which are trained with the teacher",
        low=0.0,
        high=1.0,
    )
    critic_lr: float = setting(1e-4, "learning rate of the critics' heads", low=0.0, high=1.0)
    weight_decay: float = setting(
        1e-2, "decoupled weight decay of AdamW, applied to all trained tensors", low=0.0, high=1.0
    )
    lr_decay: str = setting(
        "constant",
        "schedule of all learning rates over a stage; cosine decays them to zero, constant keeps them",
        choices=("constant", "cosine"),
    )
    grad_clip: float = setting(1.0, "maximum gradient norm of teacher and student; 0 turns clipping off", low=0.0)
    critic_grad_clip: float = setting(
        0.0, "maximum gradient norm of the critics; 0 turns clipping off, as the reference effectively does", low=0.0
    )
    share_text_encoder: bool = setting(
        True, "the student uses the teacher's token without training it; off trains a separate token for the student"
    )

    # The terms of the losses; a weight of 0 removes the term and its cost
    teacher_weight: float = setting(
        1.0, "weight of Eq. 1, the teacher's reconstruction loss on the photographs; 0 freezes the teacher", low=0.0
    )
    student_reconstruction_weight: float = setting(
        0.0, "weight of Eq. 1 for the one-step student: the only loss of the baselines, unused in EchoDistill", low=0.0
    )
    prior_weight: float = setting(
        0.0, "weight of DreamBooth's prior preservation: Eq. 1 on generated images of the class", low=0.0
    )
    prior_images: int = setting(
        100,
        "class images for prior preservation, generated once before training if prior_weight is over 0",
        unit="images",
        low=1,
    )
    alignment_weight: float = setting(
        1.0, "weight of Eq. 5, the alignment of the student with the teacher; 0 turns it off", low=0.0
    )
    identity_weight: float = setting(1.0, "weight of Eq. 2, the distance of both images' CLIP tokens", low=0.0)
    mse_weight: float = setting(1.0, "weight of Eq. 3, the squared error between both latents", low=0.0)
    swd_weight: float = setting(
        0.1, "weight of Eq. 4, the multi-scale sliced Wasserstein distance of both images", low=0.0
    )
    adversarial_weight: float = setting(1.0, "weight of Eq. 6, the adversarial loss of the student's image", low=0.0)
    dino_weight: float = setting(1.0, "weight of the DINO v1 critic in Eq. 6; 0 removes the critic", low=0.0)
    dinov2_weight: float = setting(1.0, "weight of the DINO v2 critic in Eq. 6; 0 removes the critic", low=0.0)
    dinov2_backbone: str = setting(
        "dinov2",
        "DINO v2 critic: ViT-L/14 at 518 pixels as in the paper, or ViT-S/14 at 224 at 1 % of the cost",
        choices=("dinov2", "dinov2-small"),
    )
    clip_weight: float = setting(1.0, "weight of the CLIP critic in Eq. 6; 0 removes the critic", low=0.0)
    image_every: int = setting(
        1,
        "compute image losses (Eq. 2, 4, 6, 7) every k iterations; the latent MSE (Eq. 3) in every iteration",
        unit="iterations",
        low=1,
    )
    critic_every: int = setting(
        1,
        "compute the adversarial losses (Eq. 6, 7) at every k-th computation of image losses",
        unit="comparisons",
        low=1,
    )
    alignment_by_t: bool = setting(
        True, "weight alignment by c(t) = abar_t (ADD's exponential weighting); off weights all timesteps equally"
    )
    guidance_scale: float = setting(
        7.5, "classifier-free guidance scale of the teacher in the alignment loss", low=1.0, high=50.0
    )
    swd_levels: int = setting(
        5, "levels of the Gaussian pyramid in MS-SWD; levels too small for a patch are skipped", low=1, high=10
    )
    swd_projections: int = setting(128, "random projections in MS-SWD, drawn at every call", low=1, high=4096)

    # Beyond the paper: parts that are registered by Python code (docs/extending.md)
    extra_losses: str = setting(
        "",
        "weights of registered loss terms in Eq. 5, as name=weight, separated by spaces; empty for none",
        omit_default=True,
    )
    extra_critics: str = setting(
        "",
        "weights of registered backbones as critics in Eq. 6, as name=weight, separated by spaces; empty for none",
        omit_default=True,
    )

    # Where the reference differs from the works it cites. The defaults keep its behaviour; the other values correct it.
    swd_unit_range: bool = setting(False, "pass sRGB in [0,1] to MS-SWD, as it is defined; the reference passes [-1,1]")
    backbone_normalisation: bool = setting(
        False, "normalise images with the mean and deviation of each frozen backbone; the reference passes [-1,1]"
    )
    critic_canvas: bool = setting(
        True, "show the critics shrunken photographs with their grey canvas as real images, as the reference does"
    )

    # How it computes
    precision: str = setting(
        "fp32",
        "data type for computation; bf16 halves memory on recent GPUs, trained weights stay fp32",
        choices=PRECISIONS,
    )
    memory_mode: str = setting(
        "normal",
        "low fits smaller GPUs: one image and one UNet at a time, with activation checkpointing; it is slower, and the "
        "result differs only by rounding",
        choices=("normal", "low"),
        affects_result=False,
    )
    device: str = setting("auto", "device to compute on: auto, cpu, cuda, cuda:1, mps", affects_result=False)

    # What is written while it runs
    log_every: int = setting(
        10, "iterations between log entries; losses are checked for NaN at the same time", low=1, affects_result=False
    )
    checkpoint_every: int = setting(
        100,
        "iterations between checkpoints; a killed run loses at most this many iterations",
        low=1,
        affects_result=False,
    )
    preview_every: int = setting(
        100, "iterations between previews of one-step samples; 0 turns them off", low=0, affects_result=False
    )

    def __post_init__(self) -> None:
        check_fields(self)
        weights_by_name("extra_losses", self.extra_losses)
        for critic in weights_by_name("extra_critics", self.extra_critics):
            if critic in CRITICS:
                raise InputError(f"setting extra_critics has {quoted(critic)}; set {critic}_weight instead.")

    @property
    def critic_weights(self) -> dict[str, float]:
        """The active critics: backbone name -> weight in Eq. 6. Empty without an adversarial loss."""
        weights: dict[str, float] = {critic: getattr(self, f"{critic}_weight") for critic in CRITICS}
        weights |= weights_by_name("extra_critics", self.extra_critics)
        return {name: w for name, w in weights.items() if w > 0} if self.adversarial_weight > 0 else {}

    @property
    def aligns(self) -> bool:
        """Whether any alignment loss is active, which requires the teacher's forward pass in the student's step."""
        weights = (self.identity_weight, self.mse_weight, self.swd_weight, *self.extra_loss_weights.values())
        return self.alignment_weight > 0 and max(weights) > 0

    @property
    def extra_loss_weights(self) -> dict[str, float]:
        """The active registered loss terms: name -> weight in Eq. 5. Empty without alignment."""
        weights = weights_by_name("extra_losses", self.extra_losses)
        return {name: w for name, w in weights.items() if w > 0} if self.alignment_weight > 0 else {}

    @property
    def teaches(self) -> bool:
        """Whether the teacher is trained (Eq. 1)."""
        return self.teacher_weight > 0

    @property
    def reconstructing_roles(self) -> tuple[str, ...]:
        """The roles with a reconstruction loss (Eq. 1), in the order of an iteration."""
        weights = {"teacher": self.teacher_weight, "student": self.student_reconstruction_weight}
        return tuple(role for role, weight in weights.items() if weight > 0)

    @property
    def prior_roles(self) -> tuple[str, ...]:
        """The roles with prior preservation. Class captions do not contain the token, so training it alone has none."""
        if self.prior_weight == 0 or self.trainable == "token":
            return ()
        return self.reconstructing_roles

    @property
    def generates(self) -> bool:
        """Whether an iteration generates an image with the student."""
        return self.aligns or bool(self.critic_weights)


@dataclass(frozen=True, kw_only=True)
class EchoSettings:
    """Settings of the echoing stage. All other settings are those of the distillation stage.

    Raises InputError for a value of the wrong type or outside its range.
    """

    iterations: int = setting(500, "iterations of the echoing stage", low=1)
    pool_size: int = setting(
        64, "images that the student generates once as the new training images", unit="images", low=1
    )
    prompts: str = setting("", "prompts of the generated images, separated by |; empty uses the training prompts")
    real_share: float = setting(
        0.0, "fraction of training images drawn from the photographs; the paper uses none", low=0.0, high=1.0
    )
    carry_optimizers: bool = setting(True, "keep the optimisers' moments of the first stage; off resets them")
    carry_critics: bool = setting(True, "keep the critics of the first stage; off reinitialises their heads")

    def __post_init__(self) -> None:
        check_fields(self)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # 56 % of the operations. In the miniature all metrics but CLIP-I stay within the confidence intervals
    # (docs/results.md). Images are decoded in every third iteration only, and backbones get their own normalisation.
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


def weights_by_name(setting_name: str, text: str) -> dict[str, float]:
    """The weights, 0 or more, in a setting's text "name=weight name=weight".

    Raises InputError for text of another form, a negative or infinite weight, or a name that occurs twice.
    """
    weights: dict[str, float] = {}
    for item in text.split():
        name, _, value = item.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not (math.isfinite(weight) and weight >= 0):
            raise InputError(
                f"setting {setting_name} has {quoted(item)}; expected name=weight, each name once and each weight 0 or "
                "more, separated by spaces."
            )
        weights[name] = weight
    return weights


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, or an empty string where nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def from_options(cls: type[T], options: Mapping[str, Any], recommended: Mapping[str, Any] | None = None) -> T:
    """Build a settings dataclass. Precedence: options, the preset among them, recommended values, defaults.

    recommended: values for the models in use (models.sources.settings_for). A preset wins over them.
    Raises InputError for an unknown name, suggesting the nearest, and for invalid values.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in (*options, *(recommended or {})):
        if name not in known:
            raise InputError(f"there is no setting {quoted(name)}{nearest(name, known)}.")
    preset = PRESETS.get(str(options.get("preset", "paper")), {}) if "preset" in known else {}
    return cls(**{**(recommended or {}), **preset, **options})


def affecting_result(settings: Any) -> dict[str, Any]:
    """The fields that determine a run's result, by name.

    The preset's name is left out, its values are included. Fields with `omit_default` are left out at their default.
    """
    fields = [f for f in dataclasses.fields(settings) if f.metadata["affects_result"] and f.name != "preset"]
    values = {f.name: getattr(settings, f.name) for f in fields}
    return {f.name: values[f.name] for f in fields if not (f.metadata["omit_default"] and values[f.name] == f.default)}
