"""Draws docs/strip.webp, the README's pictures, from a finished demo: python -m tools.readme_strip runs/demo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.concept.augment import to_unit
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import choose
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.reporting import to_pictures
from echodistill_core.sampling import sample
from echodistill_core.training.run import open_run

OUT = Path(__file__).parents[1] / "docs" / "strip.webp"
ROWS = 3
TITLES = ("photographs", "before training", "after training", "after the echo")
# Sizes in pixels. SIDE is twice the miniature's 64 pixels, so that enlarging without interpolation is exact.
SIDE, GAP, LABEL, HEAD, BORDER = 128, 10, 150, 34, 14
# An opaque background, since the page behind the picture is white or black.
BACKGROUND, INK = (246, 248, 250), (31, 35, 40)


def strip(
    photographs: Sequence[Image.Image], columns: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
) -> Image.Image:
    """Photographs, then one prompt and its picture from each model in every row; RGB.

    photographs, prompts: one for each row. columns: one sequence for each model, with one picture for each row.
    """
    width = 2 * BORDER + (1 + len(columns)) * SIDE + LABEL + (2 + len(columns)) * GAP
    sheet = Image.new("RGB", (width, 2 * BORDER + HEAD + len(prompts) * (SIDE + GAP) - GAP), BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    lefts = [BORDER, *(BORDER + SIDE + GAP + LABEL + GAP + i * (SIDE + GAP) for i in range(len(columns)))]
    for left, title, pictures in zip(lefts, TITLES, (photographs, *columns), strict=True):
        pen.text((left + SIDE / 2, BORDER + HEAD / 2), title, INK, font, anchor="mm")
        for row, picture in enumerate(pictures):
            enlarged = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, BORDER + HEAD + row * (SIDE + GAP)))
    for row, prompt in enumerate(prompts):
        middle = (BORDER + SIDE + GAP + LABEL / 2, BORDER + HEAD + row * (SIDE + GAP) + SIDE / 2)
        pen.multiline_text(middle, wrapped(prompt, font, LABEL), INK, font, anchor="mm", align="center")
    return sheet


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> str:
    """The text with line breaks between words, so that no line of several words is wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def draw(folder: Path) -> Image.Image:
    """The strip of a demo's run folder: the first prompts of the demo, sampled in one step from the demo's noise.

    folder: of `echodistill demo` with its default concept. Raises InputError where it holds no finished run.
    """
    run = open_run(folder)
    task, settings = choose(DemoSettings(), ()), run.settings
    family = open_family(ModelSources(family="miniature"))

    def pictures(prompts: Sequence[str], stage: str = "") -> list[Image.Image]:
        adapters = [read_adapter(run.path(stage, "student.safetensors"))] if stage else []
        with personalised(family, adapters, role="student") as model:
            # All prompts at once, as in the demo: the noise is drawn for the whole batch.
            return to_pictures(sample(model, prompts, seed=settings.seed, steps=1, guidance=1.0).cpu())[:ROWS]

    family.to(torch.device("cpu"), torch.float32)
    prompts = task.prompts(settings.placeholder)
    columns = [pictures(task.prompts()), pictures(prompts, "distil"), pictures(prompts, "echo")]
    return strip(to_pictures(to_unit(run.photographs().pixels))[:ROWS], columns, prompts[:ROWS])


def main() -> None:
    """Write the strip of the run folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run folder of `echodistill demo` with its default settings")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write (default: docs/strip.webp)")
    arguments = parser.parse_args()
    draw(arguments.folder).save(arguments.out, lossless=True)


if __name__ == "__main__":
    main()
