"""Renames one network's tensors to the current names of diffusers and transformers, and keeps the source's names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import layout
from .architectures import Architecture
from .assemble import StateDict
from .unused import unused_warnings

Names = Mapping[str, str]


def names_present(tensors: StateDict, names: Names, prefix: str) -> dict[str, str]:
    """diffusers' name -> the name in a single file, for the tensors that the file holds.

    names: as `layout.unet_names` or `layout.vae_names` return them. prefix: the file's prefix of these names.
    """
    return {here: prefix + there for here, there in names.items() if prefix + there in tensors}


def used_text_names(bare: Names, layers: int) -> set[str]:
    """The names in the source whose tensors a text encoder with this number of layers uses."""
    return {name for name, short in bare.items() if layout.transformers_text_name(short, layers)}


def convert_text_encoder(
    given: StateDict, architecture: Architecture, origin: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Text-encoder tensors under transformers 5's names, without layers and heads that the UNet does not use.

    Returns the tensors, their names in `given`, and warnings.
    """
    bare = {name: layout.strip_text_modules(name) for name in given}
    tensors, names = layout.text_tensors(given, bare, architecture, origin)
    layers = architecture.text_encoder["num_hidden_layers"]
    return tensors, names, unused_warnings(given, used_text_names(bare, layers), layers, origin)


# Names of the VAE's attention in diffusers of 2022, when the published folders were written.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert_vae(vae: StateDict, origin: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """VAE tensors under diffusers' current names, and their names in `vae`."""
    result: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in vae.items():
        head, _, leaf = name.rpartition(".")
        head, _, last = head.rpartition(".")
        modern = _OLD_VAE_ATTENTION.get(last) if ".attentions." in name else None
        if modern is None:
            layout.set_once(result, names, name, tensor, name, origin)
        else:
            plain = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
            layout.set_once(result, names, f"{head}.{modern}.{leaf}", plain, name, origin)
    return result, names
