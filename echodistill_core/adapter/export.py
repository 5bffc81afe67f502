"""Exports for tools without support for difference keys: LoRA, textual inversion, merged diffusers folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from ..errors import InputError
from ..files import replacing_folder, write_json, write_text
from ..models.architectures import Architecture
from ..models.family import Family
from ..tensorfile import write_tensors
from .apply import personalised
from .file import NOTICE, Adapter


@dataclass(frozen=True)
class LowRankMatrix:
    """The best rank-r approximation of a matrix D (Eckart & Young 1936): up @ down.

    error: |D - up down| / |D| in the Frobenius norm, 0 for D = 0.
    """

    up: Tensor
    down: Tensor
    error: float


def low_rank(delta: Tensor, rank: int) -> LowRankMatrix:
    """Approximate a matrix (out, in) by up (out, r) @ down (r, in), r = min(rank, out, in): float64 SVD."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    norm = s.norm()
    error = float(s[r:].norm() / norm) if norm > 0 else 0.0
    return LowRankMatrix((u[:, :r] * root).float(), (root[:, None] * vh[:r]).float(), error)


def export_lora(
    path: Path, adapter: Adapter, architecture: Architecture, unet_names: Mapping[str, object], rank: int
) -> dict[str, float]:
    """Write a LoRA with the keys of diffusers' `load_lora_weights`, ComfyUI and A1111-style tools.

    Also writes the token as `<stem>_token.safetensors`: a textual-inversion file whose key is the placeholder.
    Returns the relative error of every matrix, by diffusers' name.
    Raises InputError where a file exists already, and for an adapter with other tensors than matrices (full
    fine-tuning), which can only be exported merged.
    """
    for place in (path, token_path(path)):
        if place.exists():
            raise InputError(f"out {place} exists already; choose another name, or remove it first.")
    if rank < 1:
        raise InputError(f"rank is {rank}; expected 1 or more.")
    if path.suffix != ".safetensors":
        raise InputError(f"out {path} does not end in .safetensors; LoRA loaders look for that.")
    deltas = adapter.unet_deltas(architecture, unet_names)
    other = [n for n, d in deltas.items() if d.ndim != 2]
    if other:
        raise InputError(f"{other[0]} is no matrix, so this adapter cannot become a LoRA; export it with --to merged.")
    tensors, errors = {}, {}
    for name, delta in deltas.items():
        matrix = low_rank(delta, rank)
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{key}.lora_up.weight"] = matrix.up
        tensors[f"{key}.lora_down.weight"] = matrix.down
        # Loaders scale by alpha / rank = 1.
        tensors[f"{key}.alpha"] = torch.tensor(float(matrix.down.shape[0]))
        errors[name] = matrix.error
    kept = {k: v for k, v in adapter.metadata.items() if k not in ("format", "format_version")}
    worst = max(errors.values(), default=0.0)
    write_tensors(path, tensors, {**kept, "exported_rank": str(rank), "worst_relative_error": f"{worst:.6g}"})
    write_tensors(token_path(path), {adapter.placeholder: adapter.token_embeddings}, kept)
    return errors


def token_path(path: Path) -> Path:
    """Path of the token file that `export_lora` writes for this LoRA."""
    return path.with_name(f"{path.stem}_token.safetensors")


def export_merged(folder: Path, adapter: Adapter, family: Family, *, any_base: bool = False) -> None:
    """Write a diffusers pipeline with the adapter merged and the placeholder in its vocabulary.

    `StableDiffusionPipeline.from_pretrained(folder)` loads it; a one-step student samples with
    num_inference_steps=1 and guidance_scale=0. The folder is written atomically.
    Raises InputError where it exists already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out {folder} exists already; choose a new folder.")
    with personalised(family, [adapter], role=adapter.role, any_base=any_base) as model:
        tokenizer, text = _extended_text_encoder(family, adapter)
        scheduler = EulerDiscreteScheduler(
            **{k: v for k, v in family.architecture.scheduler.items() if k.startswith(("beta_", "num_train"))},
            steps_offset=1,  # as in the published configurations; unused with trailing spacing
            prediction_type=model.denoiser.schedule.prediction_type,
            timestep_spacing="trailing",
        )
        pipeline = StableDiffusionPipeline(
            vae=family.vae,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=model.denoiser.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        with replacing_folder(folder) as temporary:
            pipeline.save_pretrained(temporary, safe_serialization=True)
            _save_for_transformers_4(temporary, tokenizer, text)
            notice, licences = adapter.metadata.get("notice", NOTICE), adapter.metadata.get("base_licences", "unknown")
            write_text(temporary / "NOTICE.txt", f"{notice}\nLicences of the base models: {licences}\n")


def _save_for_transformers_4(folder: Path, tokenizer: CLIPTokenizer, text: CLIPTextModel) -> None:
    """Save tokenizer and text encoder in the format of transformers before version 5, which version 5 also reads.

    Tools that load a merged folder often have an older transformers, which would not find the weights under new names.
    """
    if not (folder / "tokenizer" / "vocab.json").is_file():
        tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    learned = {word: i for word, i in tokenizer.get_added_vocab().items() if i >= tokenizer.vocab_size}
    write_json(folder / "tokenizer" / "added_tokens.json", learned)
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text.state_dict().items()}
    write_tensors(folder / "text_encoder" / "model.safetensors", tensors, {"format": "pt"})


def _extended_text_encoder(family: Family, adapter: Adapter) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Copies of tokenizer and text encoder with the placeholder's embeddings appended to the vocabulary.

    A placeholder of several rows becomes several words, as in diffusers' textual inversion: <new1> <new1>_1 ...
    """
    tokenizer = copy.deepcopy(family.text.tokenizer)
    words = [adapter.placeholder] + [f"{adapter.placeholder}_{i}" for i in range(1, len(adapter.token_embeddings))]
    # Matched in prompts as in TextEncoder.with_placeholders.
    tokenizer.add_tokens([AddedToken(w, normalized=True, single_word=adapter.placeholder.isalnum()) for w in words])
    text = copy.deepcopy(family.text.model)
    table = family.text.table
    text.resize_token_embeddings(table.shape[0] + len(words), mean_resizing=False)
    with torch.no_grad():
        for word, row in zip(words, adapter.token_embeddings, strict=True):
            text.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = row.to(table)
    return tokenizer, text
