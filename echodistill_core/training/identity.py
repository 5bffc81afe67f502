"""What determines a run's result: its identity, the fingerprint of that, and how two of them differ."""

from __future__ import annotations

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

# Fingerprints that runs of earlier versions do not hold.
_LATER = ("student_weights", "teacher_weights", "vae", "configuration")


def run_identity(
    settings: TrainSettings, images: ImageSet, family: Family, start: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """What determines the result of the distillation stage, as JSON values by name.

    start: the adapter files that roles begin from; their content counts, not their names.
    """
    return {
        **inputs_identity(settings, images),
        **family_identity(family),
        **{f"start_{role}": file_fingerprint(path) for role, path in (start or {}).items()},
    }


def inputs_identity(settings: TrainSettings, images: ImageSet) -> dict[str, Any]:
    """The part of a run's identity that needs no models: settings and photographs."""
    return {**affecting_result(settings), "resolution": images.pixels.shape[-1], "photographs": images.fingerprint}


def family_identity(family: Family) -> dict[str, str]:
    """The part of a run's identity that is the models'."""
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


# What the same weights are computed with; widths and depths show in the weights' shapes.
_UNET = (
    *("act_fn", "norm_eps", "norm_num_groups", "attention_head_dim", "num_attention_heads"),
    *("center_input_sample", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "resnet_time_scale_shift"),
)
_VAE = ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
_TEXT = ("hidden_act", "num_attention_heads", "layer_norm_eps", "max_position_embeddings")


def _configuration(family: Family) -> str:
    """A fingerprint of activations, norms, heads, scales and noise schedules.

    The values are compared as JSON: a folder's configuration holds lists where a single file's has tuples.
    """
    denoisers = {role: d for role, d in (("student", family.student), ("teacher", family.teacher)) if d is not None}
    read: dict[str, Any] = {role: {k: d.unet.config.get(k) for k in _UNET} for role, d in denoisers.items()}
    for role, denoiser in denoisers.items():
        read[role]["schedule"] = [f"{abar:.6g}" for abar in denoiser.schedule.alphas_cumprod.tolist()]
    read["vae"] = {key: family.vae.config.get(key) for key in _VAE}
    read["text"] = {key: getattr(family.text.model.config, key, None) for key in _TEXT}
    return fingerprint_of(read)


@dataclass(frozen=True)
class DenoiserIdentity:
    """What determines a UNet's part in a result.

    fingerprint: of its cross-attention keys and values. weights: sampled, of all its weights. prediction: what it
    predicts.
    """

    fingerprint: str
    weights: str
    prediction: str


def models_identity(
    student: DenoiserIdentity, teacher: DenoiserIdentity | None, text_encoder: str, vae: str
) -> dict[str, str]:
    """The same from fingerprints, for callers that have not built a family yet."""
    return {
        "student": f"{student.fingerprint} ({student.prediction})",
        "student_weights": student.weights,
        "teacher": "none" if teacher is None else f"{teacher.fingerprint} ({teacher.prediction})",
        "teacher_weights": "none" if teacher is None else teacher.weights,
        "text_encoder": text_encoder,
        "vae": vae,
    }


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits of SHA-256 over an adapter file. Raises InputError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"adapter {path} cannot be read ({error}); give it back, or choose another.") from error


def as_known_to(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """This identity as a run of an earlier version would have recorded it.

    Without settings that are newer than the run, as far as they are left at their default, which does what was done
    before there was the setting; and without fingerprints that it did not take.
    """
    defaults = affecting_result(TrainSettings())
    later = {n: v for n, v in defaults.items() if n not in there}
    return {n: v for n, v in here.items() if n in there or (n not in _LATER and (n not in later or v != later[n]))}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs in two identities, in words: "seed is 0 there and 1 here".

    A setting that is newer than the earlier one was, in effect, at its default there.
    """
    defaults = affecting_result(TrainSettings())
    there = {**{n: defaults[n] for n in here if n in defaults}, **there}
    names = [n for n in {**there, **here} if there.get(n) != here.get(n)]
    return ", ".join(f"{n} is {quoted(there.get(n))} there and {quoted(here.get(n))} here" for n in names)
