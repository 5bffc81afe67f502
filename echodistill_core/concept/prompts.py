"""Captions for training, and prompts without their placeholder."""

from __future__ import annotations

import re
import unicodedata

import torch

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


def same_word(placeholder: str) -> str:
    """The form in which two placeholders are equal where the tokenizer takes them for one word."""
    return unicodedata.normalize("NFC", placeholder).lower()


def without_placeholder(prompt: str, placeholder: str) -> str:
    """The prompt without its placeholder: "a <new1> mug on the beach" becomes "a mug on the beach".

    Every Unicode form and case of the placeholder counts; one of letters and digits alone only as a word of its own, as
    the tokenizer reads it. placeholder: empty where the prompt has none.
    """
    if not placeholder:
        return prompt
    word = unicodedata.normalize("NFC", placeholder)
    pattern = rf"\b{re.escape(word)}\b" if word.isalnum() else re.escape(word)
    return " ".join(re.sub(pattern, " ", unicodedata.normalize("NFC", prompt), flags=re.IGNORECASE).split())
