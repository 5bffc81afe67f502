"""Adapters on a family: their differences added to the weights and their words taught to the text encoder."""

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
    """A family's student or teacher with adapters on.

    token_embeddings: of every adapter in order, (n, width), or None without adapters.
    """

    family: Family
    denoiser: Denoiser
    encoder: TextEncoder
    token_embeddings: Tensor | None
    placeholders: dict[str, str]

    def condition(self, prompts: Sequence[str]) -> TextConditioning:
        """tau(y): the conditioning of B prompts that may use the adapters' placeholders."""
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
    """Put adapters on for the duration of the block; afterwards every weight is the very tensor it was.

    strengths: one for each adapter (default 1): scales the weight differences, and moves the token's rows from the mean
        of the class noun (0) to what was learned (1). Strength 0 leaves the base model's weights exactly.
    any_base: accept an adapter trained on another checkpoint of the same shapes.
    Raises InputError where placeholders repeat, a role differs, or an adapter does not belong to this base model.
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
                # From the weights as loaded: differences can be finer than the precision that the model was cast to.
                start = changed.get(name, loaded[name].float())
                changed[name] = start + strength * delta.to(start.device)
    learned = [
        interpolated_embeddings(a, family.text.noun_embeddings(a.class_noun, len(a.token_embeddings)), s)
        for a, s in zip(adapters, strengths, strict=True)
    ]
    kept: dict[str, nn.Parameter] = {}
    try:
        for name, value in changed.items():
            kept[name] = _swap(denoiser.unet, name, nn.Parameter(value.to(weights[name]), requires_grad=False))
        yield Personalised(family, denoiser, encoder, torch.cat(learned) if learned else None, placeholders)
    finally:
        for name, parameter in kept.items():
            _swap(denoiser.unet, name, parameter)


def interpolated_embeddings(adapter: Adapter, start: Tensor, strength: float) -> Tensor:
    """The token's rows (vectors, width): from `start`, the class noun's, at 0 to the learned ones at 1."""
    # lerp is exact at both ends, which start + strength * (end - start) is not.
    return torch.lerp(start, adapter.token_embeddings.to(start), strength)


def checked_unet_deltas(adapter: Adapter, family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's differences by the names of `weights`, a UNet's state dictionary.

    Raises InputError where one has no place there or another shape.
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
    """Raise InputError unless the adapter is for this role, this width of text and, without any_base, these weights."""
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
    """A sentence where the adapter was trained on a UNet whose other layers differ from these blocks', or "".

    Cross-attention keys and values are the adapter's own business (`check_base`); a model fine-tuned elsewhere, or with
    a LoRA merged in, has the same ones and yet draws other pictures. Adapters of earlier versions do not say.
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
    """A sentence where the adapter was trained on other cross-attention than this fingerprint's, or ""."""
    if adapter.metadata["base_fingerprint"] == fingerprint:
        return ""
    return (
        f"{adapter.origin} was trained on another base model ({adapter.base_model}) and is used on this one as you "
        "allowed; its subject may look different"
    )


def check_role(adapter: Adapter, role: str, width: int) -> None:
    """Raise InputError unless the adapter is for this role and for text features of this width."""
    if adapter.role != role:
        raise InputError(
            f"{adapter.origin} belongs to the {adapter.role}, but the {role} is to use it; choose the other file."
        )
    if adapter.token_embeddings.shape[1] != width:
        raise InputError(
            f"{adapter.origin} has token rows {adapter.token_embeddings.shape[1]} wide, but this model reads text "
            f"{width} wide; it was trained on another base model ({adapter.base_model})."
        )


def check_base(adapter: Adapter, found: Mapping[str, str], model: str, remedy: str) -> None:
    """Raise InputError unless the adapter was trained on the weights with these fingerprints.

    found: "base_fingerprint" of the UNet, and "text_fingerprint" of the text encoder where that is to be checked too.
    """
    what = {"base_fingerprint": model, "text_fingerprint": "text encoder"}
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
                f"{shortened(adapter.metadata[key])}) than this {what[key]} (fingerprint {fingerprint}); {remedy}."
            )


def _swap(root: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, parameter)
    return old
