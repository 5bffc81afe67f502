"""Sets of square training images: the user's photographs, or the student's generated pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .photographs import Photograph, to_square


@dataclass(frozen=True)
class ImageSet:
    """Square images, uint8 (N, 3, S, S), with names. captions: None to draw caption templates instead."""

    pixels: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of SHA-256 over size, pixels and captions, without file names."""
        digest = hashlib.sha256(f"{tuple(self.pixels.shape)}{self.captions}".encode())
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def square_images(photographs: Sequence[Photograph], size: int, crop: str) -> ImageSet:
    """Photographs as squares of `size` pixels, cropped or squashed (`to_square`)."""
    pixels = torch.stack([to_square(p.image, size, crop) for p in photographs])
    return ImageSet(pixels, tuple(p.name for p in photographs))
