"""Captions for training, and the check that a prompt uses its placeholder."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import InputError

# Photo templates as in CLIP's prompt ensembles and Custom Diffusion, without a leading article so that the
# augmentation's "close up" can stand before them. {} is the placeholder with its class noun.
TEMPLATES = (
    "photo of a {}",
    "photo of the {}",
    "photo of my {}",
    "photo of one {}",
    "photo of a nice {}",
    "photo of the nice {}",
    "photo of a cool {}",
    "photo of the cool {}",
    "photo of a clean {}",
    "photo of the clean {}",
    "good photo of a {}",
    "good photo of the {}",
    "bright photo of a {}",
    "bright photo of the {}",
    "dark photo of a {}",
    "dark photo of the {}",
    "cropped photo of a {}",
    "cropped photo of the {}",
    "snapshot of a {}",
    "snapshot of the {}",
)


def subject(placeholder: str, class_noun: str) -> str:
    """How captions name the concept: the placeholder before its class noun, "<new1> dog"."""
    return f"{placeholder} {class_noun}".strip()


def caption(template: str, placeholder: str, class_noun: str) -> str:
    """A template with the concept in it: "photo of a <new1> dog"."""
    return template.format(subject(placeholder, class_noun))


def epoch_order(size: int, epoch: int, seed: int) -> list[int]:
    """The shuffled order of `size` items in one pass over them; a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def names_subject(prompt: str, placeholders: Iterable[str]) -> bool:
    """Whether the prompt uses one of these placeholders, in any case of letters, as the tokenizer reads them."""
    return any(name.lower() in prompt.lower() for name in placeholders)


def check_prompt(prompt: str, placeholders: dict[str, str]) -> None:
    """Raise InputError unless the prompt uses one of the adapters' placeholders.

    placeholders: placeholder -> class noun, of every adapter in use. Without adapters every prompt is right.
    """
    if placeholders and not names_subject(prompt, placeholders):
        name, noun = next(iter(placeholders.items()))
        raise InputError(
            f"the prompt {prompt!r} does not contain the placeholder {name}; write it before the class noun, "
            f'for instance "photo of a {subject(name, noun)}".'
        )
