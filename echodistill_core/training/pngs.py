"""The pictures of a run's folder: 8-bit PNGs that training reads back to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..files import replacing


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 (3, H, W) as a PNG, atomically."""
    with replacing(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")


def read_pngs(folder: Path, count: int) -> Tensor:
    """The PNG files 000.png, 001.png, ... of a folder as uint8 (N, 3, H, W). Raises InputError where one is missing."""
    pixels = []
    for i in range(count):
        path = folder / f"{i:03d}.png"
        try:
            with Image.open(path) as image:
                pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}); the run folder was changed, give it back.") from error
    return torch.stack(pixels)
