"""Converts between ComfyUI's IMAGE, (B, H, W, 3) in [0, 1], and the core's images, (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...echodistill_core.concept.photographs import Photograph


def photographs_of(images: Tensor) -> list[Photograph]:
    """An IMAGE batch, RGB or RGBA, as photographs with 8 bits per channel; transparency becomes white."""
    pixels = (images.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    result = []
    for i, array in enumerate(pixels):
        picture = Image.fromarray(array)
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        result.append(Photograph(f"image {i + 1}", picture.convert("RGB")))
    return result


def image_of(unit: Tensor) -> Tensor:
    """Convert the core's images (B, 3, H, W) in [-1, 1] to an IMAGE on the CPU."""
    return ((unit.detach().to("cpu", torch.float32).clamp(-1, 1) + 1) / 2).movedim(1, -1).contiguous()


def unit_of(images: Tensor) -> Tensor:
    """Convert an IMAGE to the core's images (B, 3, H, W) in [-1, 1] on the CPU; alpha is dropped."""
    return images[..., :3].detach().to("cpu", torch.float32).movedim(-1, 1) * 2 - 1


def image_of_files(paths: Sequence[Path]) -> Tensor:
    """Read picture files of equal size as an IMAGE."""
    arrays = []
    for path in paths:
        with Image.open(path) as picture:
            arrays.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(arrays))
