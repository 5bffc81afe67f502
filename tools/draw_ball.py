"""Draws the four pictures in docs/photographs/ball, one ball in four scenes: python -m tools.draw_ball."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 160, 4  # drawn at four times the size and reduced, for antialiasing
SCENES = (
    # name, sky, ground, centre and radius as shares of the side, tilt in degrees
    ("beach", (142, 202, 230), (233, 216, 166), 0.50, 0.60, 0.28, -15),
    ("grass", (189, 224, 254), (106, 153, 78), 0.42, 0.62, 0.25, 20),
    ("night", (20, 33, 61), (60, 60, 90), 0.56, 0.58, 0.27, 70),
    ("wood", (221, 190, 169), (127, 85, 57), 0.50, 0.55, 0.31, 160),
)


def draw(
    sky: tuple[int, ...], ground: tuple[int, ...], across: float, down: float, radius: float, tilt: float
) -> Image.Image:
    """Draw one scene, RGB, SIZE x SIZE pixels."""
    side = SIZE * SCALE
    scene = Image.new("RGB", (side, side), sky)
    pen = ImageDraw.Draw(scene)
    pen.rectangle((0, int(side * 0.6), side, side), fill=ground)
    x, y, r = side * across, side * down, side * radius
    shadow = Image.new("L", (side, side))
    ImageDraw.Draw(shadow).ellipse((x - r, y + r * 0.8, x + r, y + r * 1.15), fill=110)
    scene.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(side / 60)))
    box = (x - r, y - r, x + r, y + r)
    pen.pieslice(box, tilt, tilt + 180, fill=(244, 162, 97))
    pen.pieslice(box, tilt + 180, tilt + 360, fill=(42, 157, 143))
    pen.ellipse((x - r * 0.3, y - r * 0.3, x + r * 0.3, y + r * 0.3), fill=(254, 250, 224))
    return scene.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "docs" / "photographs" / "ball"
    folder.mkdir(exist_ok=True)
    for name, *scene in SCENES:
        draw(*scene).save(folder / f"{name}.png")  # type: ignore[arg-type]
