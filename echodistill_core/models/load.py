"""Builds a family from checkpoints: diffusers folders, single files, or tensors in memory. Offline.

Each source is first read as state dictionaries in diffusers' names. The networks are then built on the meta device and
the tensors are assigned, so a checkpoint is in memory once, in the precision of its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft

from ..errors import InputError
from ..messages import listed, shortened
from ..tensorfile import read_tensors
from .architectures import Architecture
from .assemble import Module, StateDict, assemble, empty_text_encoder, empty_unet, empty_vae
from .checkpoint import Checkpoint, Source, read_checkpoint
from .family import Denoiser, Family
from .fingerprint import fingerprint, unet_fingerprint
from .finite import check_finite
from .latents import check_vae
from .text import TextEncoder, clip_tokenizer


@torch.inference_mode(False)
def load_family(
    student: Source,
    teacher: Source | None = None,
    *,
    name: str = "custom",
    with_teacher: bool = True,
    student_prediction: str = "auto",
    teacher_prediction: str = "auto",
    student_lora: str | Path | None = None,
    architecture: Architecture | None = None,
    licences: Mapping[str, str] | None = None,
) -> Family:
    """Build a frozen family on the CPU, in the files' own precision.

    The text encoder is the teacher's and the VAE the student's; where one is missing, the other checkpoint's is used.
    with_teacher: False leaves the teacher's UNet out. Its text encoder is still used: the token was trained with it.
    student_lora: a LoRA that makes the student one-step (Hyper-SD), merged into it; needs peft.
    licences: of "teacher" and "student", for the metadata of adapters.
    Raises InputError as `read_checkpoint` and `Family` do, where neither source has a text encoder or VAE, for a VAE
    whose latents differ from the student's, and for NaN or infinity in weights.
    """
    licences = licences or {}
    s = read_checkpoint(student, prediction=student_prediction, architecture=architecture, origin="student")
    t = None
    if teacher is not None:
        t = read_checkpoint(teacher, prediction=teacher_prediction, architecture=architecture, origin="teacher")
    text_owner = t if t is not None and t.text_encoder else s
    vae_owner = s if s.vae or t is None else t
    for what, owner in (("text_encoder", text_owner), ("vae", vae_owner)):
        if not getattr(owner, what):
            raise InputError(f"{owner.origin} holds no {what}; expected a whole checkpoint, not a UNet alone.")
    check_vae(
        vae_owner.architecture.vae, vae_owner.vae, s.architecture.unet["in_channels"], f"VAE of {vae_owner.origin}"
    )
    warnings = list(dict.fromkeys((*s.warnings, *(t.warnings if t is not None else ()))))
    if t is not None and t.text_encoder and s.text_encoder and not _same_text_encoder(t, s):
        warnings.append(
            f"the text encoders of teacher ({t.origin}) and student ({s.origin}) differ: the student will read the "
            "teacher's features, which it was not trained on, and its pictures may follow prompts less well."
        )
    text = _network(text_owner, "text_encoder", empty_text_encoder(text_owner.architecture))
    tokenizer = text_owner.tokenizer or clip_tokenizer(text_owner.architecture.pad_with_end)
    teacher_denoiser = None
    if t is not None and with_teacher:
        teacher_denoiser = _denoiser(t, None, licences.get("teacher", "unknown"), warnings)
    return Family(
        name=name,
        architecture=s.architecture,
        student=_denoiser(s, student_lora, licences.get("student", "unknown"), warnings),
        teacher=teacher_denoiser,
        text=TextEncoder(text, tokenizer),
        vae=_network(vae_owner, "vae", empty_vae(vae_owner.architecture)),
        text_fingerprint=fingerprint(text_owner.text_encoder),
        warnings=warnings,
    ).freeze()


_PART_NAMES = {"unet": "UNet", "text_encoder": "text encoder", "vae": "VAE"}


def _network(checkpoint: Checkpoint, part: str, empty: Module) -> Module:
    """Build one network of a checkpoint. Raises InputError as `assemble` does, and for NaN and infinity."""
    tensors: StateDict = getattr(checkpoint, part)
    origin = f"{_PART_NAMES[part]} of {checkpoint.origin}"
    network = assemble(empty, tensors, origin)
    check_finite(tensors, checkpoint.names.get(part, {}), origin)
    return network


def _denoiser(checkpoint: Checkpoint, lora: str | Path | None, licence: str, warnings: list[str]) -> Denoiser:
    """The UNet with the LoRA merged. Appends a warning about tensors of the LoRA that are not merged."""
    unet = _network(checkpoint, "unet", empty_unet(checkpoint.architecture))
    tensors: StateDict = checkpoint.unet
    if lora is not None:
        unet = _fuse_lora(unet, Path(lora), warnings)
        check_finite(unet.state_dict(), {}, f"UNet of {checkpoint.origin} with the LoRA {lora}")
        tensors = unet.state_dict()
    return Denoiser(unet, checkpoint.schedule, unet_fingerprint(tensors), checkpoint.origin, licence)


def _check_all_merged(tensors: StateDict, unet: UNet2DConditionModel, path: Path) -> None:
    """Raise InputError where a LoRA tensor for the UNet has no target module: diffusers only logs that."""
    named = convert_unet_state_dict_to_peft(
        {n.removeprefix("unet."): t for n, t in tensors.items() if n[:5] == "unet."}
    )
    there = {name.split(".lora_")[0] for name, _ in unet.named_parameters() if ".lora_" in name}
    left = [name for name in named if name.split(".lora_")[0] not in there]
    unpaired = [n for n in named if ".lora_A." in n and n.replace(".lora_A.", ".lora_B.") not in named]
    if left or unpaired:
        raise InputError(
            f"LoRA {path} does not fit the student: {len(left) + len(unpaired)} of its tensors for the UNet have no "
            f"place there or no partner ({listed([*left, *unpaired])}); choose the LoRA of this student."
        )


def _fuse_lora(unet: UNet2DConditionModel, path: Path, warnings: list[str]) -> UNet2DConditionModel:
    """Merge a LoRA file of any layout that diffusers reads into a copy of the UNet's weights."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("merging a LoRA into the student needs the package peft; run: pip install peft") from None
    from diffusers import StableDiffusionPipeline

    # Merging adds in place; the tensors may be memory-mapped or the caller's.
    unet.load_state_dict({n: t.detach().clone() for n, t in unet.state_dict().items()}, assign=True)
    given = _apply_alphas(read_tensors(path, check_finite=True))
    try:
        tensors, alphas = StableDiffusionPipeline.lora_state_dict(given, unet_config=unet.config)
        if not any(name.startswith("unet.") for name in tensors):
            raise ValueError("it holds nothing for the UNet.")
        StableDiffusionPipeline.load_lora_into_unet(tensors, alphas, unet)
    except Exception as error:
        raise InputError(f"LoRA {path} does not fit the student: {shortened(error, 400)}") from error
    _check_all_merged(tensors, unet, path)
    others = [name for name in tensors if not name.startswith("unet.")]
    if others:
        warnings.append(
            f"LoRA {path}: {len(others)} tensors are not for the UNet and are not merged ({listed(others)}); the text "
            "encoder stays as it was."
        )
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def _apply_alphas(lora: StateDict) -> StateDict:
    """A LoRA in kohya's names with alpha/rank of each matrix multiplied into its `lora_up`.

    diffusers uses one alpha for all attention matrices and would merge files with several alphas wrongly.
    """
    result = {name: tensor for name, tensor in lora.items() if not name.endswith(".alpha")}
    for name, alpha in lora.items():
        up, down = (name.removesuffix("alpha") + part for part in ("lora_up.weight", "lora_down.weight"))
        if name.endswith(".alpha") and up in lora and down in lora:
            result[up] = lora[up] * (alpha.item() / lora[down].shape[0])
    return result


def _same_text_encoder(a: Checkpoint, b: Checkpoint) -> bool:
    if a.text_encoder.keys() != b.text_encoder.keys():
        return False
    return all(
        x.shape == b.text_encoder[n].shape and torch.equal(x.half(), b.text_encoder[n].half())
        for n, x in a.text_encoder.items()
    )
