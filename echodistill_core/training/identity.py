"""The identity of a run, which is everything that determines its result; fingerprints and comparison of identities."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..concept.images import ImageSet
from ..errors import InputError
from ..messages import quoted
from ..models.family import Family
from ..settings import TrainSettings, affecting_result

# Fingerprints that runs of earlier versions did not record.
_NEWER_FINGERPRINTS = ("student_weights", "teacher_weights", "vae", "configuration")


def run_identity(
    settings: TrainSettings, images: ImageSet, family: Family, start: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """The identity of a distillation stage: name -> JSON value.

    start: role -> adapter file that the role starts from; the file's content counts, its name does not.
    Raises InputError if such a file cannot be read.
    """
    return {
        **inputs_identity(settings, images),
        **family_identity(family),
        **{f"start_{role}": file_fingerprint(path) for role, path in (start or {}).items()},
    }


def inputs_identity(settings: TrainSettings, images: ImageSet) -> dict[str, Any]:
    """The part of the identity that needs no models: settings that affect the result, resolution and photographs."""
    return {**affecting_result(settings), "resolution": images.pixels.shape[-1], "photographs": images.fingerprint}


def family_identity(family: Family) -> dict[str, str]:
    """The part of the identity that describes the models: fingerprints of weights and configuration."""
    denoisers = {"student": family.student, "teacher": family.teacher}
    student, teacher = (
        None
        if denoiser is None
        else DenoiserIdentity(denoiser.fingerprint, family.weights_fingerprint(role), denoiser.schedule.prediction_type)
        for role, denoiser in denoisers.items()
    )
    assert student is not None
    models = models_identity(student, teacher, family.text_fingerprint, family.weights_fingerprint("vae"))
    return {**models, "configuration": _configuration(family)}


# Configuration values that change the output for the same weights. Widths and depths are visible in the weights.
_UNET = (
    *("act_fn", "norm_eps", "norm_num_groups", "attention_head_dim", "num_attention_heads"),
    *("center_input_sample", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "resnet_time_scale_shift"),
)
_VAE = ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
_TEXT = ("hidden_act", "num_attention_heads", "layer_norm_eps", "max_position_embeddings")


def _configuration(family: Family) -> str:
    """Fingerprint of activations, norms, heads, scales and noise schedules.

    Computed from JSON, in which tuples and lists are equal: one comes from single files, the other from folders.
    """
    denoisers = {role: d for role, d in (("student", family.student), ("teacher", family.teacher)) if d is not None}
    values: dict[str, Any] = {role: {k: d.unet.config.get(k) for k in _UNET} for role, d in denoisers.items()}
    for role, denoiser in denoisers.items():
        values[role]["schedule"] = [f"{abar:.6g}" for abar in denoiser.schedule.alphas_cumprod.tolist()]
    values["vae"] = {key: family.vae.config.get(key) for key in _VAE}
    values["text"] = {key: getattr(family.text.model.config, key, None) for key in _TEXT}
    return fingerprint_of(values)


@dataclass(frozen=True)
class DenoiserIdentity:
    """The identity of a UNet.

    fingerprint: of its cross-attention keys and values. weights: sampled fingerprint of all weights.
    prediction: its prediction type.
    """

    fingerprint: str
    weights: str
    prediction: str


def models_identity(
    student: DenoiserIdentity, teacher: DenoiserIdentity | None, text_encoder: str, vae: str
) -> dict[str, str]:
    """The fingerprints of `family_identity` by name, without "configuration"; for callers without a loaded family."""
    return {
        "student": f"{student.fingerprint} ({student.prediction})",
        "student_weights": student.weights,
        "teacher": "none" if teacher is None else f"{teacher.fingerprint} ({teacher.prediction})",
        "teacher_weights": "none" if teacher is None else teacher.weights,
        "text_encoder": text_encoder,
        "vae": vae,
    }


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of SHA-256 over an identity as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """The first 16 hexadecimal digits of SHA-256 over an adapter file. Raises InputError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"adapter {path} cannot be read ({error}); restore it, or choose another.") from error


def comparable_identity(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The current identity without the entries that the version of the recorded one did not have yet.

    Two kinds of entries are left out if they are not recorded: settings at their default, which reproduces earlier
    versions, and fingerprints that earlier versions did not record. A newer setting with another value stays in.
    """
    defaults = affecting_result(TrainSettings())

    def is_comparable(name: str, value: Any) -> bool:
        if name in recorded:
            return True
        return name not in _NEWER_FINGERPRINTS and (name not in defaults or value != defaults[name])

    return {name: value for name, value in current.items() if is_comparable(name, value)}


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The differences between two identities as a phrase: "seed is 0 there and 1 here". "There" is the recorded one.

    A setting that one of them lacks counts as its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
    recorded, current = (
        {**{n: defaults[n] for n in (*recorded, *current) if n in defaults}, **identity}
        for identity in (recorded, current)
    )
    names = [n for n in {**recorded, **current} if recorded.get(n) != current.get(n)]
    return ", ".join(f"{n} is {quoted(recorded.get(n))} there and {quoted(current.get(n))} here" for n in names)
