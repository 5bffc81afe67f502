"""What determines a run's result: its identity, the fingerprint of that, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..concept.images import ImageSet
from ..errors import InputError
from ..models.family import Family
from ..settings import TrainSettings, determining


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
    return {**determining(settings), "resolution": images.pixels.shape[-1], "photographs": images.fingerprint}


def family_identity(family: Family) -> dict[str, str]:
    """The part of a run's identity that is the models'."""
    teacher = family.teacher
    return models_identity(
        (family.student.fingerprint, family.student.schedule.prediction_type),
        None if teacher is None else (teacher.fingerprint, teacher.schedule.prediction_type),
        family.text_fingerprint,
    )


def models_identity(student: tuple[str, str], teacher: tuple[str, str] | None, text_encoder: str) -> dict[str, str]:
    """The same from fingerprints and what each model predicts, for callers that have not built a family yet."""
    return {
        "student": f"{student[0]} ({student[1]})",
        "teacher": "none" if teacher is None else f"{teacher[0]} ({teacher[1]})",
        "text_encoder": text_encoder,
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
    """This identity without the settings that are newer than an earlier run, as far as they are left at their default,
    which does what was done before there was the setting.
    """
    defaults = determining(TrainSettings())
    return {n: v for n, v in here.items() if n in there or n not in defaults or v != defaults[n]}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs in two identities, in words: "seed is 0 there and 1 here".

    A setting that is newer than the earlier one was, in effect, at its default there.
    """
    defaults = determining(TrainSettings())
    there = {**{n: defaults[n] for n in here if n in defaults}, **there}
    names = [n for n in {**there, **here} if there.get(n) != here.get(n)]
    return ", ".join(f"{n} is {there.get(n)!r} there and {here.get(n)!r} here" for n in names)
