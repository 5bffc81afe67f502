"""Custom Diffusion's augmentation: a photograph shrunk on a grey canvas or enlarged, with matching caption words."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINK_SHARE = 2 / 3  # of the draws; the rest enlarge
SHRINK_RANGE = (1 / 3, 1.0)  # of the side, uniformly
ENLARGE_RANGE = (1.2, 1.4)
FAR_BELOW = 0.6  # below this share of the canvas, the caption says "far away"
FAR_WORDS = ("far away", "very small")
NEAR_WORDS = ("zoomed in", "close up")


@dataclass(frozen=True)
class View:
    """One augmented view of a photograph.

    pixels: (3, S, S) in [-1, 1]; the canvas is 0. mask: (1, s, s) float, 1 on latents that are wholly inside the
    photograph. words: prefix of the caption, or "". mirrored: None for a resized view, which is not repeated.
    """

    pixels: Tensor
    mask: Tensor
    words: str
    mirrored: bool | None = None

    def name(self, photograph: Hashable) -> Hashable:
        """A key of this view of the named photograph, equal for equal views; None for a view that is not repeated."""
        return None if self.mirrored is None else (photograph, self.mirrored)


def to_unit(image: Tensor) -> Tensor:
    """uint8 pixels 0..255 as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def plain_view(image: Tensor, factor: int, mirror: bool) -> View:
    """The photograph without resizing, mirrored on request. image: uint8 (3, S, S). factor: pixels per latent."""
    pixels = to_unit(image.flip(-1) if mirror else image)
    side = image.shape[-1] // factor
    return View(pixels, torch.ones(1, side, side), "", mirror)


def draw_view(image: Tensor, factor: int, generator: torch.Generator, *, flip: bool, resize: bool) -> View:
    """Draw an augmented view of image, uint8 (3, S, S), S a multiple of `factor`.

    Two thirds of the draws shrink it to S/3..S at a random position on a grey canvas, one third enlarges it by 1.2 to
    1.4 and crops a random window. Always takes the same number of random values from `generator`.
    """
    mirror, kind, amount, across, down, word = torch.rand(6, generator=generator).tolist()
    view = plain_view(image, factor, flip and mirror < 0.5)
    if not resize:
        return view
    size = image.shape[-1]
    low, high = SHRINK_RANGE if kind < SHRINK_SHARE else ENLARGE_RANGE
    side = round(size * (low + (high - low) * amount))
    scaled = _resized(view.pixels, side)
    if side >= size:
        left, top = round((side - size) * across), round((side - size) * down)
        window = scaled[:, top : top + size, left : left + size]
        return View(window, view.mask, NEAR_WORDS[int(word * 2)] if side > size else "")
    left, top = round((size - side) * across), round((size - side) * down)
    pixels = torch.zeros_like(view.pixels)
    pixels[:, top : top + side, left : left + side] = scaled
    words = FAR_WORDS[int(word * 2)] if side < FAR_BELOW * size else ""
    return View(pixels, inside_mask(size // factor, factor, left, top, side), words)


def inside_mask(cells: int, factor: int, left: int, top: int, side: int) -> Tensor:
    """(1, cells, cells): 1 where a latent's factor x factor pixels are wholly inside the square, else 0.

    A square without a whole cell marks the cell at its centre, so that the mask is never empty.
    """
    start = torch.arange(cells) * factor
    columns = (start >= left) & (start + factor <= left + side)
    rows = (start >= top) & (start + factor <= top + side)
    mask = (rows[:, None] & columns[None, :]).float()[None]
    if not bool(mask.any()):
        mask[0, (top + side // 2) // factor, (left + side // 2) // factor] = 1
    return mask


def _resized(pixels: Tensor, side: int) -> Tensor:
    # Bicubic interpolation overshoots at edges; clamp to the range of a photograph.
    out = F.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return out[0].clamp(-1, 1)
