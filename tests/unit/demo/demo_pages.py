"""A page of the demo, and a reader of pages as a browser would read them."""

import base64
import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from echodistill_core.demo.page import Column, Page
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import choose

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Reads a page: its text, its pictures, every address in it; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.addresses, self.names = [], "", [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.names.add(tag)
        found = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "img":
            data = found["src"].removeprefix("data:image/png;base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            self.images.append((found["alt"], np.array(picture)))

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


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
