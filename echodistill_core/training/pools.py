"""Pools: training images that a model generates once and that are then read from PNG files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concept.images import ImageSet
from ..concept.prompts import TEMPLATES, caption
from ..errors import InputError
from ..files import write_json
from .events import Listener, PoolProgress
from .pngs import read_pngs, write_png


def class_prompts(class_noun: str, count: int) -> tuple[str, ...]:
    """`count` captions of the class, without the placeholder: the training templates in turn ("photo of a dog")."""
    return tuple(caption(TEMPLATES[i % len(TEMPLATES)], "", class_noun) for i in range(count))


def load_or_generate_pool(
    folder: Path,
    prompts: tuple[str, ...],
    generate: Callable[[int], Tensor],
    listen: Listener,
    *,
    name: str = "pool",
) -> ImageSet:
    """The images of a pool with their prompts as captions. Missing images are generated.

    folder: holds 000.png, 001.png, ... and, once all exist, pool.json with the prompts and the images' fingerprint.
    generate: image number -> (3, S, S) in [-1, 1], the same in every call. It generates one image at a time, since
        pixels may depend on the batch size.
    name: of the pool, for the events PoolProgress that `listen` receives.
    The result always has the stored 8-bit pixels, so an interrupted and resumed run gets the same images as any other.
    Raises InputError if the stored images were changed or are of other prompts.
    """
    record = folder / "pool.json"
    written = _read_record(record) if record.is_file() else {}
    if written and written.get("prompts") != list(prompts):
        raise InputError(f"{folder} holds a pool of other prompts; move that folder away.")
    if "fingerprint" not in written:
        for i in range(len(prompts)):
            if not (folder / f"{i:03d}.png").is_file():
                write_png(folder / f"{i:03d}.png", ((generate(i) + 1) * 127.5).round().to("cpu", torch.uint8))
            listen(PoolProgress(i + 1, len(prompts), name))
        written = {"fingerprint": _read(folder, prompts).fingerprint, "prompts": list(prompts)}
        write_json(record, written)
    pool = _read(folder, prompts)
    if pool.fingerprint != written["fingerprint"]:
        raise InputError(f"{folder} was changed since it was made; remove the folder to have it made again.")
    return pool


def _read(folder: Path, prompts: tuple[str, ...]) -> ImageSet:
    return ImageSet(read_pngs(folder, len(prompts)), tuple(f"{i:03d}.png" for i in range(len(prompts))), prompts)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove the folder {path.parent} to have it made again."
        ) from error
    return record if isinstance(record, dict) else {}
