"""A demo's page: one HTML file that needs nothing else, without scripts, for light and dark and for narrow screens."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..concept.prompts import subject
from ..evaluation.style import document
from ..miniature.world import CONTEXTS, SHAPES
from ..reporting import to_pictures
from .curves import Rows, curves
from .style import DEMO_STYLE
from .task import DemoTask

# Name of a score -> its title and what it asks.
SCORES: dict[str, tuple[str, str]] = {
    "clip_t": ("CLIP-T", "Does the picture fit its prompt? Cosine of picture and prompt, without the new word."),
    "clip_i": ("CLIP-I", "Is it like the photographs? Mean cosine with each of them, to the same encoder."),
    "dino": ("DINO", "Is it this very thing? The same with an encoder that learned from pictures alone."),
    "attributes": ("thing", "Share of shape, colours, pattern and emblem that a classifier finds right."),
    "context": ("place", "Share of pictures in the place that the prompt names, to the same classifier."),
}
_STAGES = {"distil": "of distillation", "echo": "of echo"}


@dataclass(frozen=True)
class Column:
    """One model's pictures of the prompts. images: (B, 3, S, S) in [-1, 1]. scores: by name in SCORES."""

    title: str
    note: str
    images: Tensor
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Page:
    """What a demo's page tells.

    photographs: (N, 3, S, S) in [-1, 1], as training saw them. losses: stage -> logged rows. iterations: of each
    stage. seconds: what each phase took, None where nobody measured. machine: where it trained.
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
    title = f"EchoDistill learns {page.task.title}"
    sections = {
        "The photographs": _photographs(page),
        "Six prompts, the same noise": _prompts(page),
        "Scores": _scores(page),
        "How it learned": _curves(page),
        "How long it took": _timings(page),
        "What to expect of a miniature": "".join(f"<p>{html.escape(text)}</p>" for text in expectations(page)),
        "Next": _next(page),
    }
    head = f"<header><h1>{html.escape(title)}</h1>{_lead(page)}</header>\n"
    body = "\n".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text)
    return document(title, head + body, more_style=DEMO_STYLE)


def expectations(page: Page) -> list[str]:
    """Sentences on what such a model can and cannot do."""
    if page.family == "tiny":
        return [
            "The tiny family has random weights and has learned nothing: its pictures are noise, before and after. "
            "This page shows that everything runs, and no more."
        ]
    side = page.photographs.shape[-1]
    world = (
        f"The miniature knows a world of {side}×{side} pictures: {len(SHAPES)} kinds of toys in {len(CONTEXTS)} "
        "places. It draws nothing outside of it, and nothing finer than its pixels."
    )
    if page.task.attributes is not None:
        return [
            world,
            "In that world it can learn a toy of colours that it never saw together, which is what you see here. The "
            "method and its code are those that personalise SD-Turbo; only the networks are small.",
        ]
    noun = page.task.class_noun
    unread = (
        []
        if noun in SHAPES
        else [
            f"No caption that it learned from held the words “{noun}”, so what it draws before training is arbitrary, "
            "and CLIP-T, whose encoder does not know them either, judges little more than the place."
        ]
    )
    return [
        world,
        f"Yours are real photographs, shrunk to {side}×{side} for a model that has seen drawn toys only. It can learn "
        "their colours and a rough shape; texture, faces, writing and true likeness are out of its reach.",
        *unread,
    ]


def _lead(page: Page) -> str:
    count, spent = len(page.photographs), [page.seconds.get(stage) for stage in ("distil", "echo")]
    steps = " and ".join(f"{page.iterations[stage]} iterations {name}" for stage, name in _STAGES.items())
    known = [seconds for seconds in spent if seconds is not None]
    took = f", {duration(sum(known))} in all" if len(known) == len(spent) else ""
    return (
        f'<p class="lead">From {count} photograph{"s" if count != 1 else ""}, a model that draws in a single step: '
        f"{steps}{took}.</p>"
        f'<p class="meta">{html.escape(page.family)} family · {html.escape(page.machine)}</p>'
    )


def _photographs(page: Page) -> str:
    shown = "".join(_image(p, f"photograph {i}") for i, p in enumerate(to_pictures(page.photographs), 1))
    side = page.photographs.shape[-1]
    source = "Rendered, in as many places" if page.task.attributes is not None else "Yours, cut square and shrunk"
    return (
        f'<p class="meta">{source}: {side}×{side} pixels, all that the models saw.</p><div class="strip">{shown}</div>'
    )


def _prompts(page: Page) -> str:
    pictures = [to_pictures(column.images) for column in page.columns]
    heads = "".join(
        f'<th scope="col">{html.escape(c.title)}<small>{html.escape(c.note)}</small></th>' for c in page.columns
    )
    rows = []
    for i, (prompt, context) in enumerate(zip(page.task.prompts(page.placeholder), page.task.contexts, strict=True)):
        new = page.task.shown and context not in page.task.shown
        words = html.escape(prompt).replace(html.escape(page.placeholder), f"<b>{html.escape(page.placeholder)}</b>", 1)
        note = "<small>a place that no photograph shows</small>" if new else ""
        cells = "".join(
            f"<td>{_image(of[i], f'{column.title}: {prompt}')}</td>"
            for column, of in zip(page.columns, pictures, strict=True)
        )
        rows.append(f'<tr><th scope="row">{words}{note}</th>{cells}</tr>')
    word, noun = html.escape(page.placeholder), html.escape(page.task.class_noun)
    return (
        f'<p><b class="word">{word}</b> is the new word. <b>Before</b> is the model as it was, asked for a plain '
        f"{noun}; <b>distilled</b> has learned beside its teacher from the photographs, <b>after echo</b> also from "
        "its own pictures. The <b>teacher</b>, after distilling, is what one step is to be compared with.</p>"
        f'<table class="try"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _scores(page: Page) -> str:
    names = [name for name in SCORES if any(name in column.scores for column in page.columns)]
    if not names:
        return ""
    rows = ((c.title, *(f"{c.scores[n]:.3f}" if n in c.scores else "–" for n in names)) for c in page.columns)
    meanings = "".join(f"<dt>{SCORES[n][0]}</dt><dd>{SCORES[n][1]}</dd>" for n in names)
    return (
        f"{_table(('', *(SCORES[n][0] for n in names)), rows)}<dl>{meanings}</dl>"
        f"<p>More is better, and 1 the most. Of {len(page.task.contexts)} pictures they show a "
        "direction; <code>echodistill bench --suite miniature</code> measures with intervals. The judges "
        "are networks that no training here used.</p>"
    )


def _curves(page: Page) -> str:
    plots = curves(page.losses, page.iterations)
    text = (
        "Each iteration's loss, faint, and its running mean; the echo begins at the dashed line. What the "
        "student loses to the critics is a contest and need not fall."
    )
    return f"<p>{text}</p>{plots}" if plots else ""


def _timings(page: Page) -> str:
    count = len(page.task.contexts)
    phases = {
        "open": "opening the models",
        "before": f"{count} pictures before training",
        "distil": f"distilling, {page.iterations['distil']} iterations",
        "echo": f"the echo: its pool of pictures and {page.iterations['echo']} iterations",
        "after": f"{count} pictures after distilling",
        "one_step": f"{count} pictures after the echo",
        "teacher": f"{count} pictures by the teacher",
        "scores": "scores",
    }
    measured = {name: page.seconds.get(name) for name in phases}
    rows = [(title, duration(measured[name])) for name, title in phases.items()]
    if all(value is not None for value in measured.values()):
        rows.append(("together", duration(sum(value for value in measured.values() if value is not None))))
    one, teacher = page.seconds.get("one_step"), page.seconds.get("teacher")
    speed = ""
    if one and teacher:
        speed = (
            f"<p>A picture takes {duration(one / count)} in one step and {duration(teacher / count)} with the teacher: "
            f"{teacher / one:.0f} times as long.</p>"
        )
    return _table(("phase", "time"), rows) + speed


def _next(page: Page) -> str:
    noun, folder = page.task.class_noun, shlex.quote(str(page.folder))
    steps = [
        (
            "Draw more with what it learned:",
            f'echodistill sample {folder} --prompt "a {subject(page.placeholder, noun)} on the grass"',
        )
    ]
    photos = " ".join(shlex.quote(path) for path in page.task.photos)
    if not photos:
        steps.append(
            (
                "See what the miniature makes of photographs of your own:",
                "echodistill demo --photos my-photos --class-noun dog",
            )
        )
    steps.append(
        (
            "Learn photographs in earnest, with SD-Turbo at 512×512 (an NVIDIA GPU; the first command shows sizes and "
            "licences and asks before it downloads):",
            "echodistill download sd-turbo-family\n"
            f"echodistill train --family sd-turbo --photos {photos or 'my-photos'} "
            f"--class-noun {shlex.quote(noun) if photos else 'dog'}",
        )
    )
    return "".join(f"<p>{html.escape(text)}</p><pre><code>{html.escape(line)}</code></pre>" for text, line in steps)


def duration(seconds: float | None) -> str:
    """Seconds in words that suit their size: "35 ms", "4.2 s", "1 min 05 s"; "not measured" for None."""
    if seconds is None:
        return "not measured"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cells(values: Iterable[str], tag: str) -> str:
        first, *rest = map(html.escape, values)
        return f'<th scope="row">{first}</th>' + "".join(f'<{tag} class="n">{value}</{tag}>' for value in rest)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _image(picture: Image.Image, words: str) -> str:
    """The picture inside the page."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}" width="64" height="64">'
