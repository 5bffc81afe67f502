"""A demo's page: one self-contained HTML file without scripts, for light and dark and for narrow screens."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..concept.prompts import subject
from ..evaluation import html as templates
from ..miniature.world import CONTEXTS, SHAPES
from ..reporting import to_pictures
from .curves import Rows, curves
from .task import DemoTask

# Name of a score -> its title and meaning.
SCORES: dict[str, tuple[str, str]] = {
    "clip_t": ("CLIP-T", "Prompt fidelity: cosine of picture and prompt, which is encoded without the placeholder."),
    "clip_i": ("CLIP-I", "Subject fidelity: mean cosine with each photograph, by the same encoder."),
    "dino": ("DINO", "Subject fidelity: the same by an encoder that was trained on pictures without text."),
    "attributes": ("attributes", "Share of shape, colours, pattern and emblem that a classifier recognises correctly."),
    "context": ("context", "Share of pictures that the same classifier assigns to the place in the prompt."),
}
STAGES = {"distil": "of distillation", "echo": "of echo"}
TEMPLATE = Path(__file__).parent / "templates" / "page.html.j2"


@dataclass(frozen=True)
class Column:
    """One model's samples of the prompts. images: (B, 3, S, S) in [-1, 1]. scores: by name in SCORES."""

    title: str
    note: str
    images: Tensor
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Page:
    """The content of a demo's page.

    photographs: (N, 3, S, S) in [-1, 1], as used in training. losses: stage -> logged rows. iterations: of each stage.
    seconds: duration of each phase, None where it was not measured. machine: the hardware that trained.
    """

    task: DemoTask
    placeholder: str
    family: str
    folder: Path
    photographs: Tensor
    columns: tuple[Column, ...]
    losses: Mapping[str, Rows]
    iterations: Mapping[str, int]
    seconds: Mapping[str, float | None]
    machine: str


def render(page: Page) -> str:
    """The page as HTML text."""
    task = page.task
    spent = [page.seconds.get(stage) for stage in STAGES]
    known = [seconds for seconds in spent if seconds is not None]
    return templates.render(
        TEMPLATE,
        title=f"EchoDistill learns {task.title}",
        page=page,
        stages=" and ".join(f"{page.iterations[stage]} iterations {name}" for stage, name in STAGES.items()),
        took=duration(sum(known)) if len(known) == len(spent) else "",
        side=page.photographs.shape[-1],
        photographs=_uris(page.photographs),
        prompts=_prompts(page),
        scores=_scores(page),
        curves=curves(page.losses, page.iterations),
        timings=_timings(page),
        speed=_speed(page),
        expectations=expectations(page),
        next_steps=_next_steps(page),
    )


def expectations(page: Page) -> list[str]:
    """Sentences on the abilities and limits of the family."""
    if page.family == "tiny":
        return [
            "The tiny family has random weights: its pictures are noise, before and after training. This page only "
            "shows that all steps run."
        ]
    side = page.photographs.shape[-1]
    world = (
        f"The miniature was trained on {side}×{side} renderings of {len(SHAPES)} kinds of toys in {len(CONTEXTS)} "
        "places. It cannot generate anything else, or details below its resolution."
    )
    if page.task.attributes is not None:
        return [
            world,
            "Within these limits it can learn a toy whose combination of colours was not in its training data, as on "
            "this page. Method and code are those for SD-Turbo; only the networks are small.",
        ]
    noun = page.task.class_noun
    unread = (
        []
        if noun in SHAPES
        else [
            f"The words “{noun}” were in none of its training captions, so its pictures before training are arbitrary. "
            "CLIP-T's encoder does not know these words either and measures little more than the place."
        ]
    )
    return [
        world,
        f"Your photographs were resized to {side}×{side} for a model that was trained on rendered toys alone. It can "
        "learn their colours and a rough shape; texture, faces, writing and true likeness are out of its reach.",
        *unread,
    ]


def _uris(images: Tensor) -> list[str]:
    return [templates.data_uri(picture, "png") for picture in to_pictures(images)]


def _prompts(page: Page) -> list[dict[str, Any]]:
    """For each prompt: its text before and after the placeholder, its data URIs by column, and whether it is new."""
    pictures = [_uris(column.images) for column in page.columns]
    rows = []
    for i, (prompt, context) in enumerate(zip(page.task.prompts(page.placeholder), page.task.contexts, strict=True)):
        before, _, after = prompt.partition(page.placeholder)
        rows.append(
            {
                "text": prompt,
                "before": before,
                "after": after,
                "uris": [column[i] for column in pictures],
                "new": bool(page.task.shown) and context not in page.task.shown,
            }
        )
    return rows


def _scores(page: Page) -> dict[str, Any] | None:
    """The table of scores that any column has, and their meanings; None without scores."""
    names = [name for name in SCORES if any(name in column.scores for column in page.columns)]
    if not names:
        return None
    return {
        "head": ["", *(SCORES[name][0] for name in names)],
        "rows": [(c.title, *(f"{c.scores[n]:.3f}" if n in c.scores else "–" for n in names)) for c in page.columns],
        "meanings": [SCORES[name] for name in names],
    }


def _timings(page: Page) -> list[tuple[str, str]]:
    """(phase, duration) of every phase, and the sum where all were measured."""
    count = len(page.task.contexts)
    phases = {
        "open": "loading the models",
        "before": f"{count} samples before training",
        "distil": f"distillation, {page.iterations['distil']} iterations",
        "echo": f"echo: sample pool and {page.iterations['echo']} iterations",
        "after": f"{count} samples after distillation",
        "one_step": f"{count} samples after the echo",
        "teacher": f"{count} samples by the teacher",
        "scores": "scores",
    }
    measured = {name: page.seconds.get(name) for name in phases}
    rows = [(title, duration(measured[name])) for name, title in phases.items()]
    if all(value is not None for value in measured.values()):
        rows.append(("together", duration(sum(value for value in measured.values() if value is not None))))
    return rows


def _speed(page: Page) -> str:
    """A sentence that compares one step with the teacher; "" where either was not measured."""
    count, one, teacher = len(page.task.contexts), page.seconds.get("one_step"), page.seconds.get("teacher")
    if not one or not teacher:
        return ""
    return (
        f"A picture takes {duration(one / count)} in one step and {duration(teacher / count)} with the teacher: "
        f"{teacher / one:.0f} times as long."
    )


def _next_steps(page: Page) -> list[tuple[str, str]]:
    """(explanation, commands) to continue with."""
    noun, folder = page.task.class_noun, shlex.quote(str(page.folder))
    photos = " ".join(shlex.quote(path) for path in page.task.photos)
    steps = [
        (
            "Generate more pictures with this run:",
            f'echodistill sample {folder} --prompt "a {subject(page.placeholder, noun)} on the grass"',
        )
    ]
    if not photos:
        steps.append(
            (
                "Train the miniature on your own photographs:",
                "echodistill demo --photos my-photos --class-noun dog",
            )
        )
    steps.append(
        (
            "Train SD-Turbo at 512×512 on photographs (needs an NVIDIA GPU; the first command shows sizes and licences "
            "and asks before it downloads):",
            "echodistill download sd-turbo-family\n"
            f"echodistill train --family sd-turbo --photos {photos or 'my-photos'} "
            f"--class-noun {shlex.quote(noun) if photos else 'dog'}",
        )
    )
    return steps


def duration(seconds: float | None) -> str:
    """Seconds in a unit that suits their size: "35 ms", "4.2 s", "1 min 05 s"; "not measured" for None."""
    if seconds is None:
        return "not measured"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
