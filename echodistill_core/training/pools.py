"""Pools: images that a model makes once, kept as pictures on disk, from which training then reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapter.apply import personalised
from ..adapter.file import read_adapter
from ..concept.images import ImageSet
from ..concept.photographs import Photograph
from ..concept.prompts import TEMPLATES, caption
from ..devices import DTYPES, pick_device
from ..errors import InputError
from ..files import remove_leftovers, write_json
from ..models.family import Family
from ..models.text import check_prompt
from ..sampling import TEACHER_STEPS, sample
from .events import Listener, PoolProgress
from .identity import fingerprint_of
from .pngs import read_pngs, write_png
from .run import Run

TEACHER_POOL_SEED = 2_000_000  # far from the seeds of previews, the echo's pool and a user's first samples


def class_prompts(class_noun: str, count: int) -> tuple[str, ...]:
    """Captions of the class without the placeholder, in turn: "photo of a dog", ... (`count` of them)."""
    return tuple(caption(TEMPLATES[i % len(TEMPLATES)], "", class_noun) for i in range(count))


def kept_pool(
    folder: Path,
    prompts: tuple[str, ...],
    draw: Callable[[int], Tensor],
    listen: Listener,
    *,
    name: str = "pool",
    origin: str = "",
) -> ImageSet:
    """A pool of images with their captions: read where it is whole on disk, gone on with where it is not.

    folder: gets 000.png, 001.png, ... and, last, the fingerprint in pool.json. draw: makes image i, (3, S, S) in
    [-1, 1], the same at every call; one image at a time, since what a picture looks like must not depend on the batch
    it was made in. origin: what else the images depend on; needed where the folder is not a run's own, which stands for
    all of that, and must then be new.
    What is returned are always the stored 8-bit pictures, so that a run that is killed and resumed sees the same pixels
    as one that was not. Raises InputError where a pool was changed, is another one, or the folder holds other files.
    """
    record, content = folder / "pool.json", {"prompts": list(prompts), **({"origin": origin} if origin else {})}
    written = _read_record(record) if record.is_file() else {}
    if written and any(written.get(key) != value for key, value in content.items()):
        raise InputError(f"{folder} holds another pool, of other prompts, models or sizes; choose a new folder.")
    if origin and not written:
        remove_leftovers(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no pool; choose a new or empty folder.")
        # Known for ours from the first image on, so that a later call goes on with these files and no others.
        write_json(record, content)
    if "fingerprint" not in written:
        for i in range(len(prompts)):
            if not (folder / f"{i:03d}.png").is_file():
                write_png(folder / f"{i:03d}.png", ((draw(i) + 1) * 127.5).round().to("cpu", torch.uint8))
            listen(PoolProgress(i + 1, len(prompts), name))
        written = {"fingerprint": _read(folder, prompts).fingerprint, **content}
        write_json(record, written)
    pool = _read(folder, prompts)
    if pool.fingerprint != written["fingerprint"]:
        raise InputError(f"{folder} was changed since it was made; remove the folder to have it made again.")
    return pool


def teacher_pool(
    run: Run,
    family: Family,
    folder: str | Path,
    count: int,
    listen: Listener,
    *,
    stage: str = "distil",
    prompts: Sequence[str] = (),
    steps: int = TEACHER_STEPS,
    guidance: float | None = None,
) -> list[Photograph]:
    """Images that a run's personalised teacher makes, to be the photographs of another run (teacher-first).

    folder: where they are kept, as `kept_pool` does: the same call goes on with it or reads it, and the folder is also
        one to train from. prompts: with the placeholder, in turn; none takes the training captions.
    guidance: None takes that of the run's settings. Device and precision are the run's. The family is borrowed.
    Raises InputError where the run has no teacher's adapter of that stage, the models are not its own, or the folder
    holds another pool.
    """
    settings, path = run.settings, run.path(stage, "teacher.safetensors")
    if not path.is_file():
        raise InputError(
            f"the run {run.folder} has no {stage}/teacher.safetensors; expected a finished run whose teacher learns."
        )
    if count < 1 or steps < 1:
        raise InputError(f"a pool of {count} images in {steps} steps was asked for; expected 1 or more of both.")
    for prompt in prompts:
        check_prompt(prompt, {settings.placeholder: settings.class_noun})
    adapter = read_adapter(path)
    given = list(prompts) or [caption(t, settings.placeholder, settings.class_noun) for t in TEMPLATES]
    all_prompts = tuple(given[i % len(given)] for i in range(count))
    guidance = settings.guidance_scale if guidance is None else guidance
    how = {"run": run.fingerprint(stage), "stage": stage, "steps": steps, "guidance": guidance}
    device = pick_device(settings.device)
    try:
        family.to(device, DTYPES[settings.precision])
        with personalised(family, [adapter], role="teacher") as model:

            def draw(i: int) -> Tensor:
                seed = settings.seed + TEACHER_POOL_SEED + i
                size = run.resolution
                made = sample(
                    model, [all_prompts[i]], seed=seed, steps=steps, height=size, width=size, guidance=guidance
                )
                return made[0]

            pool = kept_pool(
                Path(folder), all_prompts, draw, listen, name="teacher's images", origin=fingerprint_of(how)
            )
    finally:
        family.restore()
    return [
        Photograph(name, Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
        for name, pixels in zip(pool.names, pool.pixels, strict=True)
    ]


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
