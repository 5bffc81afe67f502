"""What the bench trains and evaluates: the paper's method, its baselines and its ablations, as settings.

One training gives several rows of the tables: EchoDistill's run is evaluated before and after the echo, as student and
teacher, in 1, 2 and 4 steps. `METHODS` is a registry: docs/extending.md shows how to add a baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..registry import Registry
from .paper import BEST as BEST_SUFFIX
from .paper import TABLES, Table, title_of
from .paper import TRIALS as TRIALS_TABLE

TEACHER_STEPS = 25


@dataclass(frozen=True)
class EvalSpec:
    """One evaluation of a trained run: the stage and role of its adapter, and the number of sampling steps.

    method: id of the row in results and report. title: the row's name in the report; "" takes `paper.title_of`.
    table: key of the table in `paper.TABLES` that the row joins, for methods that no table lists; those of table "1"
    are plotted as baselines. "" puts the row in the table "Also measured".
    """

    method: str
    stage: str = "distil"
    role: str = "student"
    steps: int = 1
    title: str = ""
    table: str = ""


@dataclass(frozen=True)
class Training:
    """One training run and its evaluations.

    options: settings that differ from the family's defaults. echo: whether the echoing stage follows distillation.
    first: name of a training in `METHODS` whose teacher this one starts from, "" for none.
    """

    name: str
    evaluations: tuple[EvalSpec, ...]
    options: dict[str, Any] = field(default_factory=dict)
    echo: bool = False
    first: str = ""


# The baselines train one model with the denoising loss on the photographs alone.
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

# The iterations and learning rates with the highest DINO on development concepts, of 3 to 5 values tried for each
# baseline with seed 0 on two or four concepts. docs/results.md lists all values.
BEST: dict[str, dict[str, Any]] = {
    "custom-diffusion-teacher": {"iterations": 300},
    "textual-inversion": {"iterations": 1000},
    "custom-diffusion": {"iterations": 400},
    "dreambooth": {"iterations": 300},
    "lora": {"iterations": 400, "student_lr": 2e-3},
    "teacher-first": {"iterations": 400},
}


def with_best_budget(name: str) -> Training:
    """A baseline with the settings of BEST; "@best" is appended to its name and to its methods."""
    plain = TRAININGS[name]
    evaluations = tuple(replace(spec, method=spec.method + BEST_SUFFIX) for spec in plain.evaluations)
    options = {**plain.options, **BEST[name]}
    return replace(plain, name=name + BEST_SUFFIX, evaluations=evaluations, options=options)


TRAININGS |= {training.name: training for training in map(with_best_budget, BEST)}


def _trial(name: str, **options: Any) -> Training:
    return Training(f"trial-{name}", (EvalSpec(f"trial-{name}"),), options)


# The sweep that the preset `tuned` was chosen from: single changes to the paper's settings, evaluated before the echo,
# with all photographs and with one.
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
        # All deviations of the reference code from the works it cites, corrected together.
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
METHODS: Registry[Training] = Registry("training", TRAININGS | TRIALS)


def report_tables() -> tuple[Table, ...]:
    """The report's tables in order, each with the methods that registered trainings add to it by `EvalSpec.table`."""
    return tuple(_with_registered(table) for table in (*TABLES, TRIALS_TABLE))


def method_title(method: str) -> str:
    """The method's name in tables and plots: that of its EvalSpec if it has one, otherwise `paper.title_of`."""
    return next((spec.title for spec in _specs() if spec.method == method and spec.title), title_of(method))


def _with_registered(table: Table) -> Table:
    added = [spec.method for spec in _specs() if spec.table == table.key]
    return replace(table, methods=tuple(dict.fromkeys((*table.methods, *added))))


def _specs() -> Iterator[EvalSpec]:
    return (spec for training in METHODS.values() for spec in training.evaluations)
