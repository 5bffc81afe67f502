"""The miniature's world in pixels: scenes as 64 x 64 pictures, from signed distances.

A signed distance is negative inside a shape and positive outside, in units of the subject's half-width; dividing it by
the width of a pixel gives edges without steps. Everything is a function of the scene alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .world import COLORS, Scene

SIDE = 64
Array = NDArray[Any]  # of floats, one for each pixel
Grid = tuple[Array, Array]
NOISE = 1.5 / 255  # standard deviation of the sensor's noise


def render(scene: Scene, side: int = SIDE) -> NDArray[np.uint8]:
    """The scene as sRGB, uint8 (side, side, 3)."""
    rng = np.random.default_rng(scene.seed)
    x, y = _grid(side)
    picture = _BACKGROUNDS[scene.context](x, y, _Chance(rng, scene.wide))
    pixel = 2 / side / scene.size
    u, v = _into_subject(x, y, scene)
    distance = _SHAPES[scene.subject.shape](u, v)
    # Soft shadow on what lies below, away from the light at the upper left.
    ground = scene.y + scene.size * 0.92
    blot = np.hypot((x - scene.x - 0.08) / scene.size, (y - ground) / (0.22 * scene.size)) - 1
    strength = 0.15 if scene.context in ("water", "night") else 0.4
    picture = picture * (1 - strength * _smooth(-blot, 0.0, 0.6))[..., None]
    inside = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    picture = picture * (1 - inside) + _surface(scene, u, v, distance, pixel) * inside
    picture = picture * scene.light * _LIGHT.get(scene.context, 1.0)
    picture = picture + rng.normal(0, NOISE, picture.shape)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


@lru_cache
def _grid(side: int) -> Grid:
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _into_subject(x: Array, y: Array, scene: Scene) -> Grid:
    """Coordinates in the subject's own frame: its half-width is 1, v points down."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    dx, dy = (x - scene.x) / scene.size, (y - scene.y) / scene.size
    u, v = cos * dx + sin * dy, -sin * dx + cos * dy
    return (-u if scene.mirrored else u), v


def _surface(scene: Scene, u: Array, v: Array, distance: Array, pixel: float) -> Array:
    """Colour of the subject at every point: pattern, emblem, shading, a darker rim."""
    subject = scene.subject
    first = np.clip(np.array(COLORS[subject.color]) + subject.tint, 0, 1)
    second = np.clip(np.array(COLORS[subject.second or subject.color]) + subject.tint, 0, 1)
    share = _PATTERNS[subject.pattern](u, v, pixel)[..., None]
    color = first * (1 - share) + second * share
    emblem = np.clip(0.5 - _EMBLEMS[subject.emblem](u, v) / pixel, 0, 1)[..., None]
    color = color * (1 - emblem) + 0.97 * emblem
    # Light from the upper left in the picture's frame, whichever way the subject is turned.
    side = -1.0 if scene.mirrored else 1.0
    shade = 1.0 - 0.16 * np.clip(0.6 * side * u + 0.8 * v, -1, 1)
    rim = 1.0 - 0.45 * _smooth(distance, -0.13, -0.01)
    return color * (shade * rim)[..., None]


def _smooth(value: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, a smooth step between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


# Shapes: signed distances, the outline within -1..1.


def _circle(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.hypot(u - x, v - y) - radius


def _box(u: Array, v: Array, x: float, y: float, half_width: float, half_height: float, round_by: float) -> Array:
    dx, dy = np.abs(u - x) - half_width + round_by, np.abs(v - y) - half_height + round_by
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - round_by


def _polygon(u: Array, v: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact distance to a closed polygon (crossing number for the sign)."""
    best, sign = np.full_like(u, np.inf), np.ones_like(u)
    for (ax, ay), (bx, by) in zip(corners, corners[-1:] + corners[:-1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        above, below, left = v >= ay, v < by, ex * wy > ey * wx
        sign = np.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return sign * np.sqrt(best)


def _star(u: Array, v: Array) -> Array:
    radii = [1.0, 0.48] * 5
    turns = [np.pi * (i / 5 - 0.5) for i in range(10)]
    return _polygon(u, v, [(r * float(np.cos(t)), r * float(np.sin(t))) for r, t in zip(radii, turns, strict=True)])


def _heart(u: Array, v: Array) -> Array:
    lobes = np.minimum(_circle(u, v, -0.46, -0.3, 0.52), _circle(u, v, 0.46, -0.3, 0.52))
    return np.minimum(lobes, _polygon(u, v, [(-0.9, -0.03), (0.0, -0.45), (0.9, -0.03), (0.0, 0.95)]))


def _mug(u: Array, v: Array) -> Array:
    handle = np.abs(_circle(u, v, 0.58, 0.02, 0.34)) - 0.11
    return np.minimum(_box(u, v, -0.2, 0.0, 0.68, 0.8, 0.16), handle)


def _fish(u: Array, v: Array) -> Array:
    body = (np.hypot((u + 0.2) / 0.8, v / 0.56) - 1) * 0.56
    return np.minimum(body, _polygon(u, v, [(0.38, 0.0), (1.0, -0.6), (0.86, 0.0), (1.0, 0.6)]))


def _mushroom(u: Array, v: Array) -> Array:
    cap = np.maximum(_circle(u, v, 0.0, 0.0, 0.95), v - 0.1)
    return np.minimum(cap, _box(u, v, 0.0, 0.45, 0.32, 0.5, 0.12))


def _house(u: Array, v: Array) -> Array:
    roof = _polygon(u, v, [(-1.0, -0.05), (0.0, -0.95), (1.0, -0.05)])
    return np.minimum(roof, _box(u, v, 0.0, 0.4, 0.72, 0.5, 0.02))


def _cat(u: Array, v: Array) -> Array:
    head = (np.hypot(u / 0.86, (v - 0.2) / 0.72) - 1) * 0.72
    ears = np.minimum(
        _polygon(u, v, [(-0.85, -0.95), (-0.18, -0.4), (-0.8, 0.1)]),
        _polygon(u, v, [(0.85, -0.95), (0.18, -0.4), (0.8, 0.1)]),
    )
    return np.minimum(head, ears)


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": lambda u, v: _circle(u, v, 0.0, 0.0, 0.9),
    "star": _star,
    "heart": _heart,
    "mug": _mug,
    "fish": _fish,
    "mushroom": _mushroom,
    "house": _house,
    "cat": _cat,
}

# Patterns: the second colour's share at a point. Emblems: signed distances.


def _dots(u: Array, v: Array, pixel: float) -> Array:
    row = np.round(v / 0.5)
    du = u / 0.58 - 0.5 * (row % 2)
    distance = np.hypot((du - np.round(du)) * 0.58, v - row * 0.5) - 0.19
    return np.clip(0.5 - distance / pixel, 0, 1)


_PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "plain": lambda u, v, pixel: np.zeros_like(u),
    "halved": lambda u, v, pixel: np.clip(0.5 - v / pixel, 0, 1),
    "striped": lambda u, v, pixel: np.clip(0.5 + (np.abs((u / 0.64) % 1 - 0.5) - 0.25) * 0.64 / pixel, 0, 1),
    "dotted": _dots,
}
_EMBLEMS: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda u, v: np.ones_like(u),
    "spot": lambda u, v: _circle(u, v, 0.0, 0.12, 0.34),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.0, 0.12, 0.13, 0.42, 0.0), _box(u, v, 0.0, 0.12, 0.42, 0.13, 0.0)),
    "sash": lambda u, v: np.abs(u * 0.7 + (v - 0.1) * 0.7) - 0.15,
}


@dataclass(frozen=True)
class _Chance:
    """Draws where things around the subject lie: near their usual places, or anywhere where the scene is wide."""

    rng: np.random.Generator
    wide: bool

    def between(self, usual: tuple[float, float], wide: tuple[float, float]) -> float:
        return float(self.rng.uniform(*(wide if self.wide else usual)))

    def phase(self, most: float = 1.0) -> float:
        """Of a wave, in radians."""
        return self.between((0, most), (0, 6.28))

    def places(self, count: int) -> Array:
        """(2, count): x and y of scattered things."""
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

# Contexts: pictures (side, side, 3) in 0..1 without the subject.

_LIGHT = {"night": 0.8, "sunset": 0.97}


def _rgb(*values: float) -> Array:
    return np.array(values, np.float32)


def _fade(share: Array, first: Array, second: Array) -> Array:
    return first + (second - first) * share[..., None]


def _land(x: Array, y: Array, horizon: float, sky: tuple[Array, Array], ground: tuple[Array, Array]) -> Array:
    """Sky that pales towards the horizon above ground that brightens towards the viewer."""
    above = _fade(np.clip((y + 1) / (horizon + 1), 0, 1), *sky)
    below = _fade(np.clip((y - horizon) / (1 - horizon), 0, 1), *ground)
    return above + (below - above) * np.clip((y - horizon) * 20 + 0.5, 0, 1)[..., None]


def _spots(x: Array, y: Array, chance: _Chance, count: int, radius: tuple[float, float]) -> Array:
    """Soft round spots anywhere, 0..1."""
    px, py = chance.places(count)
    r = chance.rng.uniform(*radius, count)
    result = np.zeros_like(x)
    for cx, cy, cr in zip(px, py, r, strict=True):
        result = np.maximum(result, np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / cr**2))
    return result


def _beach(x: Array, y: Array, chance: _Chance) -> Array:
    horizon = chance.between((-0.3, -0.2), (-0.35, -0.15))
    picture = _land(
        x, y, horizon, (_rgb(0.45, 0.72, 0.95), _rgb(0.8, 0.92, 0.98)), (_rgb(0.96, 0.87, 0.66), _rgb(0.9, 0.76, 0.5))
    )
    shore = horizon + 0.3 + 0.05 * np.sin(3 * x + chance.phase())
    sea = np.clip((y - horizon) * 20 + 0.5, 0, 1) * np.clip((shore - y) * 12 + 0.5, 0, 1)
    return picture + (_rgb(0.12, 0.55, 0.72) - picture) * sea[..., None]


def _snow(x: Array, y: Array, chance: _Chance) -> Array:
    horizon = chance.between((-0.1, 0.0), (-0.15, 0.05)) + 0.08 * np.sin(2.2 * x + chance.phase())
    picture = _land(
        x, y, 0.0, (_rgb(0.62, 0.72, 0.84), _rgb(0.8, 0.86, 0.93)), (_rgb(0.93, 0.96, 1.0), _rgb(0.88, 0.93, 0.99))
    )
    hill = np.clip((y - horizon) * 14 + 0.5, 0, 1)[..., None]
    picture = picture * (1 - hill) + _rgb(0.94, 0.96, 1.0) * hill * (1 - 0.06 * y[..., None])
    return picture + (1 - picture) * 0.9 * _spots(x, y, chance, 7, (0.055, 0.08))[..., None]


def _grass(x: Array, y: Array, chance: _Chance) -> Array:
    horizon = chance.between((-0.22, -0.12), (-0.3, -0.05))
    picture = _land(
        x, y, horizon, (_rgb(0.5, 0.78, 0.98), _rgb(0.85, 0.95, 1.0)), (_rgb(0.45, 0.72, 0.28), _rgb(0.22, 0.5, 0.14))
    )
    blades = 0.5 + 0.5 * np.sin(19 * x + 5 * np.sin(4 * y + chance.phase()) + chance.phase())
    return picture * (1 - 0.13 * blades * np.clip((y - horizon) * 4, 0, 1))[..., None]


def _night(x: Array, y: Array, chance: _Chance) -> Array:
    picture = _land(
        x, y, 0.35, (_rgb(0.03, 0.04, 0.16), _rgb(0.13, 0.14, 0.36)), (_rgb(0.1, 0.12, 0.2), _rgb(0.05, 0.06, 0.12))
    )
    sky = np.clip((0.3 - y) * 10, 0, 1)
    picture = picture + (1 - picture) * (0.9 * _spots(x, y, chance, 6, (0.045, 0.06)) * sky)[..., None]
    moon_x, moon_y = chance.between((0.5, 0.65), (-0.8, 0.8)), chance.between((-0.75, -0.65), (-0.85, -0.6))
    moon = np.clip(0.5 - (np.hypot(x - moon_x, y - moon_y) - 0.17) / 0.03, 0, 1)
    return picture + (_rgb(1.0, 0.97, 0.8) - picture) * moon[..., None]


def _wood(x: Array, y: Array, chance: _Chance) -> Array:
    offset = chance.between((0, 0.2), (0, 1))
    plank = y * 2.1 + offset
    tone = np.sin(np.floor(plank) * 2.4 + chance.phase(0.5)) * 0.08
    grain = 0.035 * np.sin(26 * y + 2.5 * np.sin(2.3 * x + np.floor(plank) * 4) + chance.phase())
    gap = np.clip(1 - np.minimum(plank % 1, 1 - plank % 1) / 0.06, 0, 1)
    return _rgb(0.66, 0.43, 0.24) * (1 + tone + grain - 0.35 * gap)[..., None]


def _brick(x: Array, y: Array, chance: _Chance) -> Array:
    row = y * 2.4 + chance.between((0, 0.15), (0, 1))
    column = x * 1.4 + 0.5 * (np.floor(row) % 2) + chance.between((0, 0.1), (0, 1))
    tone = 0.1 * np.sin(np.floor(row) * 5.1 + np.floor(column) * 3.7 + chance.phase(0.5))
    joint = np.maximum(
        np.clip(1.6 - np.minimum(row % 1, 1 - row % 1) / 0.06, 0, 1),
        np.clip(1.6 - np.minimum(column % 1, 1 - column % 1) / 0.035, 0, 1),
    )[..., None]
    wall = _rgb(0.62, 0.27, 0.2) * (1 + tone[..., None]) * (1 - joint) + _rgb(0.74, 0.6, 0.52) * joint
    floor = np.clip((y - 0.72) * 20, 0, 1)[..., None]
    return wall * (1 - floor) + _rgb(0.5, 0.5, 0.5) * floor


def _water(x: Array, y: Array, chance: _Chance) -> Array:
    picture = _fade((y + 1) / 2, _rgb(0.32, 0.78, 0.86), _rgb(0.02, 0.26, 0.46))
    rays = 0.5 + 0.5 * np.sin(7 * (x + 0.35 * y) + chance.phase())
    picture = picture * (1 + 0.16 * rays * np.clip(0.6 - y, 0, 1))[..., None]
    ring = np.zeros_like(x)
    for bubble_x, bubble_y, radius in chance.bubbles(5):
        distance = np.abs(np.hypot(x - bubble_x, y - bubble_y) - radius)
        ring = np.maximum(ring, np.clip(1 - distance / 0.045, 0, 1))
    return picture + (1 - picture) * 0.5 * ring[..., None]


def _sunset(x: Array, y: Array, chance: _Chance) -> Array:
    horizon = chance.between((0.24, 0.32), (0.2, 0.35))
    picture = _land(
        x, y, horizon, (_rgb(0.36, 0.2, 0.5), _rgb(1.0, 0.62, 0.3)), (_rgb(0.3, 0.14, 0.2), _rgb(0.16, 0.07, 0.14))
    )
    distance = np.hypot(x - chance.between((-0.65, -0.5), (-0.75, 0.75)), y - horizon)
    sun = np.clip(0.5 - (distance - 0.3) / 0.04, 0, 1) * np.clip((horizon - y) * 20 + 0.5, 0, 1)
    return picture + (_rgb(1.0, 0.92, 0.55) - picture) * sun[..., None]


_BACKGROUNDS: dict[str, Callable[[Array, Array, _Chance], Array]] = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "night": _night,
    "wood": _wood,
    "brick": _brick,
    "water": _water,
    "sunset": _sunset,
}
