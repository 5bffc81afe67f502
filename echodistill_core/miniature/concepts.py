"""The concepts for personalisation: subjects with held-out pairs of colours, five photographs each.

Settings are chosen on the development concepts only; the evaluation concepts are for results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..concept.photographs import Photograph
from .render import SIDE, render
from .world import CONTEXTS, HELD_OUT_PAIRS, SHAPES, Subject, random_scene, random_tint

PHOTOGRAPHS = 5


@dataclass(frozen=True)
class Concept:
    """One subject to learn. contexts: of its photographs. seed: of the poses in its photographs."""

    name: str
    subject: Subject
    contexts: tuple[str, ...]
    seed: int

    @property
    def class_noun(self) -> str:
        """The subject's shape."""
        return self.subject.shape

    @property
    def attributes(self) -> dict[str, str]:
        """The subject's attributes, by the names of judges.ATTRIBUTES; without the context."""
        return {name: getattr(self.subject, name) for name in ("shape", "color", "second", "pattern", "emblem")}


def _concept(seed: int, name: str, shape: str, color: str, pattern: str, second: str, emblem: str) -> Concept:
    assert {color, second} in [set(pair) for pair in HELD_OUT_PAIRS], name
    rng = np.random.default_rng((99, seed))
    tint = random_tint(rng)
    contexts = tuple(str(c) for c in rng.choice(list(CONTEXTS), PHOTOGRAPHS, replace=False))
    return Concept(name, Subject(shape, color, pattern, second, emblem, tint), contexts, seed)


DEVELOPMENT = (
    _concept(1, "dotted-mug", "mug", "orange", "dotted", "purple", "cross"),
    _concept(2, "halved-fish", "fish", "red", "halved", "green", "none"),
    _concept(3, "striped-cat", "cat", "cyan", "striped", "pink", "spot"),
    _concept(4, "halved-ball", "ball", "yellow", "halved", "green", "sash"),
)
EVALUATION = (
    _concept(11, "striped-mug", "mug", "blue", "striped", "yellow", "none"),
    _concept(12, "halved-cat", "cat", "pink", "halved", "red", "cross"),
    _concept(13, "dotted-fish", "fish", "yellow", "dotted", "pink", "none"),
    _concept(14, "striped-house", "house", "red", "striped", "blue", "spot"),
    _concept(15, "halved-mushroom", "mushroom", "cyan", "halved", "blue", "sash"),
    _concept(16, "dotted-ball", "ball", "green", "dotted", "orange", "cross"),
)
CONCEPTS = {concept.name: concept for concept in (*DEVELOPMENT, *EVALUATION)}


def photographs(concept: Concept, count: int = PHOTOGRAPHS) -> list[Photograph]:
    """The first `count` (1 to 5) photographs of the concept, each in another context."""
    rng = np.random.default_rng((98, concept.seed))
    scenes = [random_scene(concept.subject, context, rng) for context in concept.contexts]
    return [
        Photograph(f"{concept.name}-{i}.png", Image.fromarray(render(scene))) for i, scene in enumerate(scenes[:count])
    ]


def outside_domain_warning(photographs: Sequence[Photograph], class_noun: str) -> str:
    """A warning for photographs or a class noun outside the miniature's domain of eight toys; "" for none."""
    is_small = all(photograph.image.size == (SIDE, SIDE) for photograph in photographs)
    if is_small and class_noun in SHAPES:
        return ""
    found = f"a {class_noun}" if class_noun not in SHAPES else "photographs of another size"
    return (
        f"the miniature draws {SIDE} x {SIDE} pictures of eight toys only ({', '.join(SHAPES)}); it cannot draw {found}"
        ", and will make it look like one of its toys: for real photographs train SD-Turbo"
    )


def prompts(concept: Concept, placeholder: str) -> list[tuple[str, str]]:
    """(prompt, context) for every context: "a <new1> mug on the beach"."""
    return [
        (f"a {placeholder} {concept.class_noun} {words}".replace("  ", " "), name) for name, words in CONTEXTS.items()
    ]
