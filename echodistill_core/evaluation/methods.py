"""What the bench trains and evaluates: the paper's method, its baselines and its ablations, as settings.

A training gives several rows of the tables: EchoDistill's run is looked at before and after its echo, by student and
teacher, in 1, 2 and 4 steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .paper import BEST as BEST_SUFFIX

TEACHER_STEPS = 25


@dataclass(frozen=True)
class EvalSpec:
    """One evaluation of a trained run: which stage's adapter, worn by which role, sampling in how many steps.

    method: its id in evaluation.paper, which has the titles.
    """

    method: str
    stage: str = "distil"
    role: str = "student"
    steps: int = 1


@dataclass(frozen=True)
class Training:
    """One run. options: settings other than the family's own. first: a training whose teacher this one starts from."""

    name: str
    looks: tuple[EvalSpec, ...]
    options: dict[str, Any] = field(default_factory=dict)
    echo: bool = False
    first: str = ""


# The baselines train one model on the photographs and nothing else.
_ON_TEACHER = {"alignment_weight": 0.0, "adversarial_weight": 0.0}
_ON_STUDENT = {**_ON_TEACHER, "teacher_weight": 0.0, "student_reconstruction_weight": 1.0}


def _one(name: str, **options: Any) -> Training:
    return Training(name, (EvalSpec(name),), options)


TRAININGS: dict[str, Training] = {
    training.name: training
    for training in (
        Training(
            "echodistill",
            (
                EvalSpec("echodistill"),
                EvalSpec("steps-2", steps=2),
                EvalSpec("steps-4", steps=4),
                EvalSpec("echodistill-teacher", role="teacher", steps=TEACHER_STEPS),
                EvalSpec("echodistill-echo", stage="echo"),
                EvalSpec("echodistill-echo-teacher", "echo", "teacher", TEACHER_STEPS),
            ),
            echo=True,
        ),
        Training(
            "custom-diffusion-teacher",
            (EvalSpec("custom-diffusion-teacher", role="teacher", steps=TEACHER_STEPS),),
            _ON_TEACHER,
        ),
        _one("textual-inversion", **_ON_STUDENT, trainable="token"),
        _one("custom-diffusion", **_ON_STUDENT),
        _one("dreambooth", **_ON_STUDENT, trainable="full+token", prior_weight=1.0),
        _one("lora", **_ON_STUDENT, trainable="lora+token"),
        Training(
            "teacher-first",
            (EvalSpec("teacher-first"),),
            {"teacher_weight": 0.0},
            first="custom-diffusion-teacher",
        ),
        _one("no-teacher", teacher_weight=0.0, alignment_weight=0.0),
        _one("no-critics", adversarial_weight=0.0),
        _one("no-identity", identity_weight=0.0),
        _one("no-mse", mse_weight=0.0),
        _one("no-swd", swd_weight=0.0),
        _one("no-dino", dino_weight=0.0),
        _one("no-dinov2", dinov2_weight=0.0),
        _one("no-clip", clip_weight=0.0),
        _one("one-photograph", max_photographs=1),
        _one("not-shared", share_text_encoder=False),
        Training("tuned", (EvalSpec("tuned"), EvalSpec("tuned-echo", stage="echo")), {"preset": "tuned"}, echo=True),
    )
}

# The budget and learning rates at which each baseline did best on development concepts: of 3 to 5 tried, the highest
# DINO, by seed 0 on two or four concepts (docs/results.md has all that were tried).
BEST: dict[str, dict[str, Any]] = {
    "custom-diffusion-teacher": {"iterations": 300},
    "textual-inversion": {"iterations": 1000},
    "custom-diffusion": {"iterations": 400},
    "dreambooth": {"iterations": 300},
    "lora": {"iterations": 400, "student_lr": 2e-3},
    "teacher-first": {"iterations": 400},
}


def at_best(name: str) -> Training:
    """A baseline with the settings of BEST, under its own name and "@best"."""
    plain = TRAININGS[name]
    looks = tuple(replace(look, method=look.method + BEST_SUFFIX) for look in plain.looks)
    return replace(plain, name=name + BEST_SUFFIX, looks=looks, options={**plain.options, **BEST[name]})


TRAININGS |= {training.name: training for training in map(at_best, BEST)}


def _trial(name: str, **options: Any) -> Training:
    return Training(f"trial-{name}", (EvalSpec(f"trial-{name}"),), options)


# What might become `tuned`: one change each to the paper's settings, before the echo, and the same from one photograph.
TRIALS: dict[str, Training] = {
    training.name: training
    for training in (
        _trial("paper"),
        _trial("swd-range", swd_unit_range=True),
        _trial("normalisation", backbone_normalisation=True),
        _trial("critic-clip", critic_grad_clip=1.0),
        _trial("cosine", lr_decay="cosine"),
        _trial("critics-2", critic_every=2),
        _trial("batch-4", batch_size=4),
        # Every departure of the reference from the works it cites, mended at once.
        _trial("mended", swd_unit_range=True, backbone_normalisation=True, critic_canvas=False, critic_grad_clip=1.0),
        _trial("normalised-critics-2", backbone_normalisation=True, critic_every=2),
        _trial("tuned", preset="tuned"),
        _trial("images-4", preset="tuned", image_every=4),
        _trial("images-5", preset="tuned", image_every=5),
        _trial("tuned-critics", preset="tuned", critic_lr=3e-4),
        _trial("tuned-fast", preset="tuned", critic_lr=3e-4, student_lr=7e-4),
        _trial("one-paper", max_photographs=1),
        _trial("one-augment", max_photographs=1, augment=True),
        _trial("one-cosine", max_photographs=1, lr_decay="cosine"),
        _trial("one-tuned", max_photographs=1, preset="tuned"),
    )
}
ALL = TRAININGS | TRIALS
