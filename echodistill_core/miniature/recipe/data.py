"""Captioned images of the miniature's domain, rendered once into a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...concept.augment import to_unit
from ...files import replacing
from ..render import render_all
from ..world import CONTEXTS, Scene, caption, random_captioned_scene, random_scene, random_subject

CHUNK = 512
Draw = Callable[[np.random.Generator], list[tuple[Scene, str]]]


@dataclass(frozen=True)
class CaptionedImages:
    """pixels: uint8 (N, 3, 64, 64), memory-mapped. captions: N strings. scenes: the N rendered scenes."""

    pixels: Tensor
    captions: list[str]
    scenes: list[Scene]

    def batch(self, index: Tensor, device: torch.device) -> Tensor:
        """The images at these indices as float32 (B, 3, 64, 64) in [-1, 1]."""
        return to_unit(self.pixels[index].to(device))


def load_images(folder: Path, count: int, seed: int, *, wide: bool) -> CaptionedImages:
    """`count` captioned pretraining scenes, rendered into the folder on the first call.

    wide: with larger variation, for networks that must generalise beyond the training scenes.
    """
    name = f"{'wide' if wide else 'scenes'}-{seed}-{count}"
    return _rendered(folder / name, partial(one_scene, wide=wide), count, seed)


def load_pairs(folder: Path, count: int, seed: int, *, all_colors: bool) -> CaptionedImages:
    """2 * `count` images: 2 i and 2 i + 1 show one subject in two contexts.

    all_colors: with the held-out pairs of colours; for judges only.
    """
    draw = partial(random_pair, all_colors=all_colors)
    return _rendered(folder / f"pairs-{seed}-{count}", draw, count, seed)


def one_scene(rng: np.random.Generator, *, wide: bool = False) -> list[tuple[Scene, str]]:
    """A random captioned pretraining scene."""
    return [random_captioned_scene(rng, wide=wide)]


def random_pair(rng: np.random.Generator, *, all_colors: bool) -> list[tuple[Scene, str]]:
    """One subject in two different contexts, with wide variation, captioned."""
    subject = random_subject(rng, all_colors=all_colors)
    contexts = rng.choice(list(CONTEXTS), 2, replace=False)
    drawn = [random_scene(subject, str(c), rng, wide=True) for c in contexts]
    return [(s, caption(s, np.random.default_rng(s.seed))) for s in drawn]


def draw_scenes(draw: Draw, count: int, seed: int) -> list[tuple[Scene, str]]:
    """The scenes of `count` draws, in order; shorter lists are prefixes of longer ones."""
    drawn: list[tuple[Scene, str]] = []
    for start in range(0, count, CHUNK):
        rng = np.random.default_rng((seed, start))
        for _ in range(min(CHUNK, count - start)):
            drawn += draw(rng)
    return drawn


def _rendered(path: Path, draw: Draw, count: int, seed: int) -> CaptionedImages:
    pixels_path = path.with_suffix(".npy")
    drawn = draw_scenes(draw, count, seed)
    if not pixels_path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # spawn: a forked process would inherit the locks of torch's threads.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            jobs = [[s for s, _ in drawn[i : i + CHUNK]] for i in range(0, len(drawn), CHUNK)]
            parts = list(pool.map(render_all, jobs))
        with replacing(pixels_path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts), allow_pickle=False)
    pixels = np.load(pixels_path, mmap_mode="c", allow_pickle=False)
    return CaptionedImages(torch.from_numpy(pixels), [text for _, text in drawn], [scene for scene, _ in drawn])
