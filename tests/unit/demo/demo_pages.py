"""A page of the demo with random pictures."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from echodistill_core.demo.page import Column, Page
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import choose


def bytes_of(image):
    """An image (3, H, W) in [-1, 1] as the nearest of 256 values, (H, W, 3)."""
    return np.rint((np.asarray(image, np.float64) + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 0)


def a_page(task=None, **changes):
    task = task or choose(DemoSettings(), [])
    generator = torch.Generator().manual_seed(1)

    def pictures(count):
        return torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1

    columns = tuple(Column(name, "1 step", pictures(6), {}) for name in ("before", "after"))
    page = Page(
        task=task,
        placeholder="<new1>",
        family="miniature",
        folder=Path("runs/my demo"),
        photographs=pictures(5),
        columns=columns,
        losses={"distil": [{"step": 1, "recon_teacher": 1.0}], "echo": []},
        iterations={"distil": 2, "echo": 1},
        seconds={"distil": 61.0, "echo": 4.0},
        machine="a & b",
    )
    return dataclasses.replace(page, **changes)
