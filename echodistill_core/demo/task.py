"""The task of a demo: a concept of the miniature or the user's photographs, and the prompts of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..concept.photographs import Photograph, load_photographs
from ..concept.prompts import subject
from ..errors import InputError
from ..miniature.concepts import DEVELOPMENT, Concept, photographs
from ..miniature.world import CONTEXTS, describe
from ..settings import nearest
from .settings import DemoSettings

DEFAULT_CONCEPT = "dotted-mug"
PROMPTS = 6


@dataclass(frozen=True)
class DemoTask:
    """A concept with its photographs.

    title: a description for the page. photos: paths of the user's photographs, empty for a concept of the miniature.
    attributes: attribute -> value ("shape": "mug"), None if unknown. shown: contexts of the photographs.
    """

    title: str
    class_noun: str
    photographs: list[Photograph]
    photos: tuple[str, ...] = ()
    attributes: Mapping[str, str] | None = None
    shown: tuple[str, ...] = ()

    @property
    def contexts(self) -> tuple[str, ...]:
        """The six contexts of the prompts; contexts that no photograph shows come first."""
        return tuple(sorted(CONTEXTS, key=lambda context: context in self.shown)[:PROMPTS])

    def prompts(self, placeholder: str = "") -> list[str]:
        """One prompt for each context: "a <new1> mug on the beach", or "a mug on the beach" without a placeholder."""
        return [f"a {subject(placeholder, self.class_noun)} {CONTEXTS[context]}" for context in self.contexts]


def choose(settings: DemoSettings, photos: Sequence[str]) -> DemoTask:
    """The task of these settings: the user's photographs if there are any, otherwise a concept of the miniature.

    Raises InputError for an unknown concept, a concept together with photographs, photographs that cannot be read or
    have no class noun, and a class noun without photographs.
    """
    noun = " ".join(settings.class_noun.split())
    if not photos:
        if noun:
            raise InputError(
                f"class_noun {noun!r} was given without photographs; add --photos with a folder of them, or leave "
                "--class-noun out to train on a concept of the miniature."
            )
        return _of_concept(settings.concept or DEFAULT_CONCEPT)
    if settings.concept:
        raise InputError(
            f"both photographs and the concept {settings.concept!r} were given; a demo trains on one concept: "
            "leave out --photos or --concept."
        )
    if not noun:
        raise InputError(
            "class_noun is empty; expected a noun for the photographs' subject, for instance --class-noun dog."
        )
    found = load_photographs(photos[0] if len(photos) == 1 else photos)
    return DemoTask(f"your {noun}", noun, found, photos=tuple(str(Path(p)) for p in photos))


def _of_concept(name: str) -> DemoTask:
    known = {concept.name: concept for concept in DEVELOPMENT}
    if name not in known:
        raise InputError(
            f"there is no concept {name!r} for a demo; expected one of {', '.join(known)}{nearest(name, known)}."
        )
    concept: Concept = known[name]
    words = describe(concept.subject)
    return DemoTask(
        title=f"{'an' if words[0] in 'aeiou' else 'a'} {words}",
        class_noun=concept.class_noun,
        photographs=photographs(concept),
        attributes=concept.attributes,
        shown=concept.contexts,
    )
