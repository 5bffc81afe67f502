"""Renders the miniature's contexts: backgrounds with details near their usual positions or anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # floats, one for each pixel
LIGHT = {"night": 0.8, "sunset": 0.97}  # brightness in these contexts; 1 in all others


def background(context: str, x: Array, y: Array, rng: np.random.Generator, *, wide: bool) -> Array:
    """The context without a subject, sRGB (side, side, 3) in 0..1.

    x, y: coordinates in -1..1, right and down. wide: as in world.Scene.
    """
    return _BACKGROUNDS[context](x, y, _Placement(rng, wide))


@dataclass(frozen=True)
class _Placement:
    """Random positions of background details: near their usual positions, or anywhere for a wide scene."""

    rng: np.random.Generator
    wide: bool

    def between(self, usual: tuple[float, float], wide: tuple[float, float]) -> float:
        return float(self.rng.uniform(*(wide if self.wide else usual)))

    def phase(self, most: float = 1.0) -> float:
        """Phase of a wave, in radians."""
        return self.between((0, most), (0, 6.28))

    def places(self, count: int) -> Array:
        """(2, count): x and y of scattered details."""
        if self.wide:
            return self.rng.uniform(-1, 1, (2, count))
        return _USUAL[:, :count] + self.rng.uniform(-0.06, 0.06, (2, count))

    def bubbles(self, count: int) -> Array:
        """(count, 3): x, y and radius of each."""
        if self.wide:
            radius, x, y = self.rng.uniform((0.07, -1, -1), (0.12, 1, 1), (count, 3)).T
        else:
            x, y = self.places(count)
            radius = self.rng.uniform(0.07, 0.12, count)
        return np.stack([x, y, radius], 1)


_USUAL = np.random.default_rng(8).uniform(-0.95, 0.95, (2, 64))


def _rgb(*values: float) -> Array:
    return np.array(values, np.float32)


def _fade(share: Array, first: Array, second: Array) -> Array:
    return first + (second - first) * share[..., None]


def _land(x: Array, y: Array, horizon: float, sky: tuple[Array, Array], ground: tuple[Array, Array]) -> Array:
    """Sky above the horizon and ground below, each with a vertical gradient."""
    above = _fade(np.clip((y + 1) / (horizon + 1), 0, 1), *sky)
    below = _fade(np.clip((y - horizon) / (1 - horizon), 0, 1), *ground)
    return above + (below - above) * np.clip((y - horizon) * 20 + 0.5, 0, 1)[..., None]


def _spots(x: Array, y: Array, placement: _Placement, count: int, radius: tuple[float, float]) -> Array:
    """Soft round spots, 0..1."""
    px, py = placement.places(count)
    r = placement.rng.uniform(*radius, count)
    result = np.zeros_like(x)
    for cx, cy, cr in zip(px, py, r, strict=True):
        result = np.maximum(result, np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / cr**2))
    return result


def _beach(x: Array, y: Array, placement: _Placement) -> Array:
    horizon = placement.between((-0.3, -0.2), (-0.35, -0.15))
    picture = _land(
        x, y, horizon, (_rgb(0.45, 0.72, 0.95), _rgb(0.8, 0.92, 0.98)), (_rgb(0.96, 0.87, 0.66), _rgb(0.9, 0.76, 0.5))
    )
    shore = horizon + 0.3 + 0.05 * np.sin(3 * x + placement.phase())
    sea = np.clip((y - horizon) * 20 + 0.5, 0, 1) * np.clip((shore - y) * 12 + 0.5, 0, 1)
    return picture + (_rgb(0.12, 0.55, 0.72) - picture) * sea[..., None]


def _snow(x: Array, y: Array, placement: _Placement) -> Array:
    horizon = placement.between((-0.1, 0.0), (-0.15, 0.05)) + 0.08 * np.sin(2.2 * x + placement.phase())
    picture = _land(
        x, y, 0.0, (_rgb(0.62, 0.72, 0.84), _rgb(0.8, 0.86, 0.93)), (_rgb(0.93, 0.96, 1.0), _rgb(0.88, 0.93, 0.99))
    )
    hill = np.clip((y - horizon) * 14 + 0.5, 0, 1)[..., None]
    picture = picture * (1 - hill) + _rgb(0.94, 0.96, 1.0) * hill * (1 - 0.06 * y[..., None])
    return picture + (1 - picture) * 0.9 * _spots(x, y, placement, 7, (0.055, 0.08))[..., None]


def _grass(x: Array, y: Array, placement: _Placement) -> Array:
    horizon = placement.between((-0.22, -0.12), (-0.3, -0.05))
    picture = _land(
        x, y, horizon, (_rgb(0.5, 0.78, 0.98), _rgb(0.85, 0.95, 1.0)), (_rgb(0.45, 0.72, 0.28), _rgb(0.22, 0.5, 0.14))
    )
    blades = 0.5 + 0.5 * np.sin(19 * x + 5 * np.sin(4 * y + placement.phase()) + placement.phase())
    return picture * (1 - 0.13 * blades * np.clip((y - horizon) * 4, 0, 1))[..., None]


def _night(x: Array, y: Array, placement: _Placement) -> Array:
    picture = _land(
        x, y, 0.35, (_rgb(0.03, 0.04, 0.16), _rgb(0.13, 0.14, 0.36)), (_rgb(0.1, 0.12, 0.2), _rgb(0.05, 0.06, 0.12))
    )
    sky = np.clip((0.3 - y) * 10, 0, 1)
    picture = picture + (1 - picture) * (0.9 * _spots(x, y, placement, 6, (0.045, 0.06)) * sky)[..., None]
    moon_x, moon_y = placement.between((0.5, 0.65), (-0.8, 0.8)), placement.between((-0.75, -0.65), (-0.85, -0.6))
    moon = np.clip(0.5 - (np.hypot(x - moon_x, y - moon_y) - 0.17) / 0.03, 0, 1)
    return picture + (_rgb(1.0, 0.97, 0.8) - picture) * moon[..., None]


def _wood(x: Array, y: Array, placement: _Placement) -> Array:
    offset = placement.between((0, 0.2), (0, 1))
    plank = y * 2.1 + offset
    tone = np.sin(np.floor(plank) * 2.4 + placement.phase(0.5)) * 0.08
    grain = 0.035 * np.sin(26 * y + 2.5 * np.sin(2.3 * x + np.floor(plank) * 4) + placement.phase())
    gap = np.clip(1 - np.minimum(plank % 1, 1 - plank % 1) / 0.06, 0, 1)
    return _rgb(0.66, 0.43, 0.24) * (1 + tone + grain - 0.35 * gap)[..., None]


def _brick(x: Array, y: Array, placement: _Placement) -> Array:
    row = y * 2.4 + placement.between((0, 0.15), (0, 1))
    column = x * 1.4 + 0.5 * (np.floor(row) % 2) + placement.between((0, 0.1), (0, 1))
    tone = 0.1 * np.sin(np.floor(row) * 5.1 + np.floor(column) * 3.7 + placement.phase(0.5))
    joint = np.maximum(
        np.clip(1.6 - np.minimum(row % 1, 1 - row % 1) / 0.06, 0, 1),
        np.clip(1.6 - np.minimum(column % 1, 1 - column % 1) / 0.035, 0, 1),
    )[..., None]
    wall = _rgb(0.62, 0.27, 0.2) * (1 + tone[..., None]) * (1 - joint) + _rgb(0.74, 0.6, 0.52) * joint
    floor = np.clip((y - 0.72) * 20, 0, 1)[..., None]
    return wall * (1 - floor) + _rgb(0.5, 0.5, 0.5) * floor


def _water(x: Array, y: Array, placement: _Placement) -> Array:
    picture = _fade((y + 1) / 2, _rgb(0.32, 0.78, 0.86), _rgb(0.02, 0.26, 0.46))
    rays = 0.5 + 0.5 * np.sin(7 * (x + 0.35 * y) + placement.phase())
    picture = picture * (1 + 0.16 * rays * np.clip(0.6 - y, 0, 1))[..., None]
    ring = np.zeros_like(x)
    for bubble_x, bubble_y, radius in placement.bubbles(5):
        distance = np.abs(np.hypot(x - bubble_x, y - bubble_y) - radius)
        ring = np.maximum(ring, np.clip(1 - distance / 0.045, 0, 1))
    return picture + (1 - picture) * 0.5 * ring[..., None]


def _sunset(x: Array, y: Array, placement: _Placement) -> Array:
    horizon = placement.between((0.24, 0.32), (0.2, 0.35))
    picture = _land(
        x, y, horizon, (_rgb(0.36, 0.2, 0.5), _rgb(1.0, 0.62, 0.3)), (_rgb(0.3, 0.14, 0.2), _rgb(0.16, 0.07, 0.14))
    )
    distance = np.hypot(x - placement.between((-0.65, -0.5), (-0.75, 0.75)), y - horizon)
    sun = np.clip(0.5 - (distance - 0.3) / 0.04, 0, 1) * np.clip((horizon - y) * 20 + 0.5, 0, 1)
    return picture + (_rgb(1.0, 0.92, 0.55) - picture) * sun[..., None]


_BACKGROUNDS: dict[str, Callable[[Array, Array, _Placement], Array]] = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "night": _night,
    "wood": _wood,
    "brick": _brick,
    "water": _water,
    "sunset": _sunset,
}
