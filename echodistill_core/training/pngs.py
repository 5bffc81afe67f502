"""The pictures in a run's folder: 8-bit PNG files, from which training reads exactly the pixels that were written."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..errors import InputError
from ..files import replacing


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image (3, H, W) as a PNG file, atomically. Raises StorageError if it cannot be written."""
    with replacing(path) as temporary:
        to_pil_image(image).save(temporary, format="PNG")


def read_pngs(folder: Path, count: int) -> Tensor:
    """The files 000.png, 001.png, ... of a folder as uint8 (count, 3, H, W), RGB.

    Raises InputError for a file that is missing or no picture.
    """
    pixels = []
    for i in range(count):
        path = folder / f"{i:03d}.png"
        try:
            with Image.open(path) as image:
                pixels.append(pil_to_tensor(image.convert("RGB")))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}); restore the original file.") from error
    return torch.stack(pixels)
