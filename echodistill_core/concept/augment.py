"""Custom Diffusion's augmentation: a photograph made smaller on a grey canvas or larger, with words that say so."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINK_SHARE = 2 / 3  # of the draws; the rest enlarge
SHRINK_RANGE = (1 / 3, 1.0)  # of the side, uniformly
ENLARGE_RANGE = (1.2, 1.4)
FAR_BELOW = 0.6  # a photograph smaller than this share of the canvas is called far away
FAR_WORDS = ("far away", "very small")
NEAR_WORDS = ("zoomed in", "close up")


@dataclass(frozen=True)
class View:
    """One draw of a photograph.

    pixels: (3, S, S) in [-1, 1]; the canvas is 0. mask: (1, s, s) float, 1 on latents that lie wholly inside the
    photograph. words: what to write before the caption, or "". mirrored: None where it was resized as well, by an
    amount that will not come again.
    """

    pixels: Tensor
    mask: Tensor
    words: str
    mirrored: bool | None = None

    def name(self, photograph: Hashable) -> Hashable:
        """A name of this view of the photograph of this name, the same when it comes again; None if it never does."""
        return None if self.mirrored is None else (photograph, self.mirrored)


def to_unit(image: Tensor) -> Tensor:
    """uint8 pixels 0..255 as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def plain_view(image: Tensor, factor: int, mirror: bool) -> View:
    """The photograph as it is, or mirrored. image: uint8 (3, S, S); factor: pixels per latent."""
    pixels = to_unit(image.flip(-1) if mirror else image)
    side = image.shape[-1] // factor
    return View(pixels, torch.ones(1, side, side), "", mirror)


def draw_view(image: Tensor, factor: int, generator: torch.Generator, *, flip: bool, resize: bool) -> View:
    """Draw an augmented view of image, uint8 (3, S, S), S a multiple of `factor`.

    Two thirds of the draws shrink it to S/3..S at a random place of a grey canvas, one third enlarges it 1.2 to 1.4
    times and cuts a random window. Takes the same count of random numbers from `generator` whatever is drawn.
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
    """(1, cells, cells): 1 where a latent's factor x factor pixels lie wholly inside the square, else 0.

    A square too small to hold a whole cell marks the cell that its centre is in, so that the mask is never empty.
    """
    start = torch.arange(cells) * factor
    columns = (start >= left) & (start + factor <= left + side)
    rows = (start >= top) & (start + factor <= top + side)
    mask = (rows[:, None] & columns[None, :]).float()[None]
    if not bool(mask.any()):
        mask[0, (top + side // 2) // factor, (left + side // 2) // factor] = 1
    return mask


def _resized(pixels: Tensor, side: int) -> Tensor:
    # Bicubic overshoots at edges; the range of a photograph is kept.
    out = F.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return out[0].clamp(-1, 1)
