"""Applies adapters to a family: weight differences to the UNet, token embeddings to the text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..concept.prompts import normalised_placeholder
from ..errors import InputError, Notice
from ..messages import listed, shortened
from ..models.conditioning import TextConditioning
from ..models.family import Denoiser, Family
from ..models.fingerprint import differing_blocks
from ..models.text import TextEncoder
from .file import Adapter


@dataclass(frozen=True)
class Personalised:
    """A family's student or teacher with adapters applied.

    encoder: the family's text encoder, with the placeholders in its tokenizer.
    token_embeddings: of all adapters, in order, (n, width); None without adapters.
    placeholders: placeholder -> class noun, of every adapter.
    """

    family: Family
    denoiser: Denoiser
    encoder: TextEncoder
    token_embeddings: Tensor | None
    placeholders: dict[str, str]

    def condition(self, prompts: Sequence[str]) -> TextConditioning:
        """tau(prompt) of B prompts, which may contain the adapters' placeholders."""
        return TextConditioning(self.encoder(prompts, self.token_embeddings))


@contextmanager
def personalised(
    family: Family,
    adapters: Sequence[Adapter] = (),
    strengths: Sequence[float] = (),
    *,
    role: str = "student",
    any_base: bool = False,
) -> Iterator[Personalised]:
    """Apply adapters during the block; afterwards the UNet has the same parameter objects as before.

    strengths: one per adapter (default 1). It scales the weight differences, and interpolates the token embeddings
        between the class noun's (0) and the trained ones (1). Strength 0 gives exactly the base model's weights.
    role: "student" or "teacher". any_base: accept adapters of another base model with the same shapes.
    Raises InputError if two adapters share a placeholder, or if an adapter has another role or base model.
    """
    strengths = list(strengths) or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise InputError(f"{len(strengths)} strengths were given for {len(adapters)} adapters; expected one each.")
    denoiser = family.student if role == "student" else family.teacher
    if denoiser is None:
        raise InputError("the teacher was asked for but not loaded; give its checkpoint.")
    placeholders: dict[str, str] = {}
    for adapter in adapters:
        check_fit(adapter, family, denoiser, role, any_base=any_base)
        if normalised_placeholder(adapter.placeholder) in map(normalised_placeholder, placeholders):
            raise InputError(
                f"two adapters share the placeholder {adapter.placeholder}; train one of them with another placeholder."
            )
        placeholders[adapter.placeholder] = adapter.class_noun
    encoder = family.text.with_placeholders({a.placeholder: len(a.token_embeddings) for a in adapters})
    weights, loaded = denoiser.unet.state_dict(), family.loaded[role]
    changed: dict[str, Tensor] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for name, delta in checked_unet_deltas(adapter, family, weights).items():
            if strength != 0:
                # Added to the loaded weights: a difference can be below the resolution of the precision in use.
                start = changed.get(name, loaded[name].float())
                changed[name] = start + strength * delta.to(start.device)
    embeddings = [
        interpolated_embeddings(a, family.text.noun_embeddings(a.class_noun, len(a.token_embeddings)), s)
        for a, s in zip(adapters, strengths, strict=True)
    ]
    originals: dict[str, nn.Parameter] = {}
    try:
        for name, value in changed.items():
            originals[name] = _swap(denoiser.unet, name, nn.Parameter(value.to(weights[name]), requires_grad=False))
        yield Personalised(family, denoiser, encoder, torch.cat(embeddings) if embeddings else None, placeholders)
    finally:
        for name, parameter in originals.items():
            _swap(denoiser.unet, name, parameter)


def interpolated_embeddings(adapter: Adapter, start: Tensor, strength: float) -> Tensor:
    """start + strength (trained - start): the adapter's token embeddings (vectors, width) at a strength.

    start: the class noun's embeddings (vectors, width), at strength 0. The trained ones are at strength 1.
    """
    # Unlike this formula in floating point, lerp is exact at 0 and 1.
    return torch.lerp(start, adapter.token_embeddings.to(start), strength)


def checked_unet_deltas(adapter: Adapter, family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weight differences under the names of `weights`, a UNet's state dictionary.

    Raises InputError if the UNet has no such weight, or a weight of another shape.
    """
    deltas = adapter.unet_deltas(family.architecture, weights)
    for name, delta in deltas.items():
        if delta.shape != weights[name].shape:
            raise InputError(
                f"{adapter.origin}: {name} has shape {tuple(delta.shape)}; this model has "
                f"{tuple(weights[name].shape)}. It was trained on another base model."
            )
    return deltas


def check_fit(
    adapter: Adapter,
    family: Family,
    denoiser: Denoiser,
    role: str,
    *,
    any_base: bool = False,
    remedy: str = "load that one, or allow it with --any-base",
) -> None:
    """Raise InputError unless the adapter has this role, fits the text encoder's width and, without any_base, was
    trained on this base model. Warns (Notice) about differences that `block_mismatch` or `base_mismatch` finds.

    remedy: end of the error message for another base model.
    """
    check_role(adapter, role, family.text.width)
    if not any_base:
        found = {"base_fingerprint": denoiser.fingerprint, "text_fingerprint": family.text_fingerprint}
        check_base(adapter, found, f"{role} {denoiser.origin}", remedy)
        difference = block_mismatch(adapter, family.blocks(role))
    else:
        difference = base_mismatch(adapter, denoiser.fingerprint)
    if difference:
        warnings.warn(difference, category=Notice, stacklevel=4)


def block_mismatch(adapter: Adapter, blocks: Mapping[str, str]) -> str:
    """A warning if the adapter was trained on a UNet with other weights besides cross-attention keys and values; or "".

    blocks: block -> fingerprint of the UNet in use. A fine-tuned model, or one with a merged LoRA, may have the same
    keys and values, which `check_base` compares, and still generate other pictures. Adapters of earlier versions have
    no block fingerprints and give no warning.
    """
    differing = differing_blocks(adapter.base_blocks, blocks) if adapter.base_blocks else []
    if not differing:
        return ""
    return (
        f"{adapter.origin} was trained on a model with the same cross-attention but other weights in "
        f"{len(differing)} of {len(blocks)} blocks ({listed(differing)}), so its subject may look different; for the "
        f"pictures of training use its own base model ({adapter.base_model}), without a LoRA"
    )


def base_mismatch(adapter: Adapter, fingerprint: str) -> str:
    """A warning if the adapter was trained on cross-attention weights with another fingerprint; or ""."""
    if adapter.metadata["base_fingerprint"] == fingerprint:
        return ""
    return (
        f"{adapter.origin} was trained on another base model ({adapter.base_model}) and is used on this one as you "
        "allowed; its subject may look different"
    )


def check_role(adapter: Adapter, role: str, width: int) -> None:
    """Raise InputError unless the adapter has this role and token embeddings of this width."""
    if adapter.role != role:
        raise InputError(
            f"{adapter.origin} belongs to the {adapter.role}, but the {role} is to use it; choose the other file."
        )
    if adapter.token_embeddings.shape[1] != width:
        raise InputError(
            f"{adapter.origin} has token embeddings of width {adapter.token_embeddings.shape[1]}, but this model needs "
            f"width {width}; it was trained on another base model ({adapter.base_model})."
        )


def check_base(adapter: Adapter, found: Mapping[str, str], model: str, remedy: str) -> None:
    """Raise InputError unless the adapter was trained on weights with these fingerprints.

    found: "base_fingerprint" of the UNet, "text_fingerprint" of the text encoder; a missing entry is not checked.
    model: name of the UNet in the error message. remedy: end of the message.
    """
    models = {"base_fingerprint": model, "text_fingerprint": "text encoder"}
    base = found.get("base_fingerprint", adapter.metadata["base_fingerprint"])
    if base != adapter.metadata["base_fingerprint"] and base == adapter.metadata.get("other_fingerprint"):
        other = "teacher" if adapter.role == "student" else "student"
        raise InputError(
            f"{adapter.origin} is the {adapter.role}'s, but in that training this model was the {other}: use the "
            f"{other}'s adapter, or, if student and teacher were swapped there, train again with SD-Turbo as student."
        )
    for key, fingerprint in found.items():
        if adapter.metadata[key] != fingerprint:
            raise InputError(
                f"{adapter.origin} was trained on another base model ({adapter.base_model}, fingerprint "
                f"{shortened(adapter.metadata[key])}) than this {models[key]} (fingerprint {fingerprint}); {remedy}."
            )


def _swap(root: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Replace a parameter. Returns the previous one."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, parameter)
    return old
