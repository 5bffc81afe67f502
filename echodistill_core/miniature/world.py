"""The miniature's image domain: attributes of scenes, random scenes, and their captions.

A scene is one subject in one context. A subject has a shape, one or two colours in a pattern, and optionally a white
emblem. Pretraining uses 16 of the 28 pairs of colours; the other pairs are reserved for the concepts learned from
photographs, so no pretrained model of the miniature has seen these pairs on one subject.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

SHAPES = ("ball", "star", "heart", "mug", "fish", "mushroom", "house", "cat")
# sRGB in 0..1.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.14),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.98, 0.87, 0.20),
    "green": (0.16, 0.66, 0.24),
    "cyan": (0.25, 0.85, 0.90),
    "blue": (0.14, 0.30, 0.85),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.98, 0.52, 0.74),
}
PATTERNS = ("plain", "halved", "striped", "dotted")
EMBLEMS = ("none", "spot", "cross", "sash")
# Context -> its words in captions.
CONTEXTS: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "wood": "on a wooden floor",
    "brick": "in front of a brick wall",
    "water": "under water",
    "sunset": "at sunset",
}

_PAIRS = list(combinations(COLORS, 2))
# Split so that every colour occurs both in the pretraining pairs and in the held-out pairs.
_PART = [(3 * i + i // 7) % 7 for i in range(len(_PAIRS))]
PRETRAINING_PAIRS = tuple(p for p, part in zip(_PAIRS, _PART, strict=True) if part < 4)
HELD_OUT_PAIRS = tuple(p for p, part in zip(_PAIRS, _PART, strict=True) if part >= 4)


@dataclass(frozen=True)
class Subject:
    """The attributes that all images of one subject share.

    second: the pattern's second colour; equal to `color` for a plain pattern.
    tint: shift of both colours in sRGB, within -0.05..0.05, which varies colours of one name.
    """

    shape: str
    color: str
    pattern: str = "plain"
    second: str = ""
    emblem: str = "none"
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A subject in a context: all parameters of one image.

    x, y: centre of the subject in units of half the side, right and down. size: its half-width in the same unit.
    angle: in radians. light: brightness, 1 for day. mirrored: the subject is flipped horizontally.
    seed: of background details and sensor noise.
    wide: whether the background's details vary over the whole image or only around their usual positions.
    """

    subject: Subject
    context: str
    x: float
    y: float
    size: float
    angle: float
    light: float
    mirrored: bool
    seed: int
    wide: bool = False


# Photo templates as in training on photographs, without those that change the image.
_TEMPLATES = (
    "photo of a {}",
    "photo of the {}",
    "photo of my {}",
    "photo of one {}",
    "photo of a nice {}",
    "photo of the cool {}",
    "photo of a clean {}",
    "good photo of a {}",
    "cropped photo of the {}",
    "snapshot of a {}",
    "a {}",
    "the {}",
    "{}",
)


def random_subject(rng: np.random.Generator, *, all_colors: bool = False) -> Subject:
    """A random subject with pretraining's pairs of colours; all_colors: with all pairs."""
    pattern = PATTERNS[rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))]
    if pattern == "plain":
        color = second = str(rng.choice(list(COLORS)))
    else:
        pairs = _PAIRS if all_colors else PRETRAINING_PAIRS
        pair = pairs[rng.integers(len(pairs))]
        color, second = pair if rng.random() < 0.5 else pair[::-1]
    emblem = EMBLEMS[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))]
    return Subject(str(rng.choice(SHAPES)), color, pattern, second, emblem, random_tint(rng))


def random_tint(rng: np.random.Generator) -> tuple[float, float, float]:
    """A random shift of a subject's colours, each channel in -0.05..0.05."""
    red, green, blue = rng.uniform(-0.05, 0.05, 3)
    return float(red), float(green), float(blue)


def random_scene(subject: Subject, context: str, rng: np.random.Generator, *, wide: bool = False) -> Scene:
    """A random scene with the subject near the centre; wide: with larger variation."""
    return Scene(
        subject,
        context,
        x=float(rng.uniform(-0.16, 0.16) if wide else rng.uniform(-0.1, 0.1)),
        y=float(rng.uniform(-0.08, 0.16) if wide else rng.uniform(-0.04, 0.12)),
        size=float(rng.uniform(0.5, 0.66) if wide else rng.uniform(0.54, 0.64)),
        angle=float(rng.normal(0, 0.12 if wide else 0.08)),
        light=float(rng.uniform(0.9, 1.08)),
        mirrored=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
        wide=wide,
    )


def random_captioned_scene(rng: np.random.Generator, *, wide: bool = False) -> tuple[Scene, str]:
    """A random pretraining scene and a caption of some of its attributes.

    Scenes whose caption begins with "dark", "bright", "close up", "zoomed in", "far away" or "very small" are rendered
    accordingly.
    """
    scene = random_scene(random_subject(rng), str(rng.choice(list(CONTEXTS))), rng, wide=wide)
    text = caption(scene, rng)
    kind = rng.random()
    if kind < 0.04:
        return replace(scene, light=0.62), f"dark {text}"
    if kind < 0.08:
        return replace(scene, light=1.25), f"bright {text}"
    if kind < 0.12:
        return replace(scene, size=scene.size * 1.3), f"{rng.choice(['close up', 'zoomed in'])} {text}"
    if kind < 0.16:
        return replace(scene, size=scene.size * 0.55), f"{rng.choice(['far away', 'very small'])} {text}"
    return scene, text


def caption(scene: Scene, rng: np.random.Generator, *, detail: float = 0.8) -> str:
    """A random caption of the scene; colours, emblem and context are each left out at random.

    detail: probability of naming the colours, and of naming the emblem.
    """
    words = describe(scene.subject, with_colors=rng.random() < detail, with_emblem=rng.random() < detail)
    where = f" {CONTEXTS[scene.context]}" if rng.random() < 0.9 else ""
    return str(rng.choice(_TEMPLATES)).format(words) + where


def describe(subject: Subject, *, with_colors: bool = True, with_emblem: bool = True) -> str:
    """The subject's description: "red and blue striped mug with a white cross"."""
    words = subject.shape
    if with_colors:
        if subject.pattern == "plain":
            words = f"{subject.color} {words}"
        else:
            kind = {"halved": "two-tone", "striped": "striped", "dotted": "dotted"}[subject.pattern]
            words = f"{subject.color} and {subject.second} {kind} {words}"
    if with_emblem and subject.emblem != "none":
        words = f"{words} with a white {subject.emblem}"
    return words
