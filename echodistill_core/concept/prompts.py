"""Training captions, and removing the placeholder from prompts."""

from __future__ import annotations

import re
import unicodedata

import torch

# Photo templates as in CLIP's prompt ensembles and Custom Diffusion, without a leading article, since the augmentation
# prefixes words such as "close up". {} is the placeholder with its class noun.
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
    """The concept in captions: placeholder and class noun, "<new1> dog"."""
    return f"{placeholder} {class_noun}".strip()


def caption(template: str, placeholder: str, class_noun: str) -> str:
    """A template with the concept in it: "photo of a <new1> dog"."""
    return template.format(subject(placeholder, class_noun))


def epoch_order(size: int, epoch: int, seed: int) -> list[int]:
    """A permutation of range(size) for one epoch; a pure function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def normalised_placeholder(placeholder: str) -> str:
    """Normal form of a placeholder, as the tokenizer applies it; equal where it sees one word."""
    return unicodedata.normalize("NFC", placeholder).lower()


def without_placeholder(prompt: str, placeholder: str) -> str:
    """The prompt without its placeholder: "a <new1> mug on the beach" becomes "a mug on the beach".

    All Unicode forms and cases of the placeholder match. A placeholder of letters and digits matches whole words only,
    as in the tokenizer. placeholder: "" for a prompt without one.
    """
    if not placeholder:
        return prompt
    word = unicodedata.normalize("NFC", placeholder)
    pattern = rf"\b{re.escape(word)}\b" if word.isalnum() else re.escape(word)
    return " ".join(re.sub(pattern, " ", unicodedata.normalize("NFC", prompt), flags=re.IGNORECASE).split())
