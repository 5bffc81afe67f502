"""Renders the miniature's scenes to 64 x 64 images by signed distance functions.

A signed distance is negative inside a shape and positive outside, in units of the subject's half-width; dividing it by
the width of a pixel gives antialiased edges. Rendering is a pure function of the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .backgrounds import LIGHT, Array, background
from .world import COLORS, Scene

SIDE = 64
Grid = tuple[Array, Array]
NOISE = 1.5 / 255  # standard deviation of the sensor noise


def render(scene: Scene, side: int = SIDE) -> NDArray[np.uint8]:
    """Render the scene as sRGB, uint8 (side, side, 3)."""
    rng = np.random.default_rng(scene.seed)
    x, y = _grid(side)
    picture = background(scene.context, x, y, rng, wide=scene.wide)
    pixel = 2 / side / scene.size
    u, v = _into_subject(x, y, scene)
    distance = _SHAPES[scene.subject.shape](u, v)
    # Soft shadow below the subject; the light is at the upper left.
    ground = scene.y + scene.size * 0.92
    blot = np.hypot((x - scene.x - 0.08) / scene.size, (y - ground) / (0.22 * scene.size)) - 1
    strength = 0.15 if scene.context in ("water", "night") else 0.4
    picture = picture * (1 - strength * _smooth(-blot, 0.0, 0.6))[..., None]
    inside = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    picture = picture * (1 - inside) + _surface(scene, u, v, distance, pixel) * inside
    picture = picture * scene.light * LIGHT.get(scene.context, 1.0)
    picture = picture + rng.normal(0, NOISE, picture.shape)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def render_all(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Render scenes channels first: sRGB, uint8 (N, 3, 64, 64)."""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 3, 1, 2)


@lru_cache
def _grid(side: int) -> Grid:
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _into_subject(x: Array, y: Array, scene: Scene) -> Grid:
    """Coordinates in the subject's frame: half-width 1, v points down."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    dx, dy = (x - scene.x) / scene.size, (y - scene.y) / scene.size
    u, v = cos * dx + sin * dy, -sin * dx + cos * dy
    return (-u if scene.mirrored else u), v


def _surface(scene: Scene, u: Array, v: Array, distance: Array, pixel: float) -> Array:
    """Colour of the subject at every pixel: pattern, emblem, shading, darker rim."""
    subject = scene.subject
    first = np.clip(np.array(COLORS[subject.color]) + subject.tint, 0, 1)
    second = np.clip(np.array(COLORS[subject.second or subject.color]) + subject.tint, 0, 1)
    share = _PATTERNS[subject.pattern](u, v, pixel)[..., None]
    color = first * (1 - share) + second * share
    emblem = np.clip(0.5 - _EMBLEMS[subject.emblem](u, v) / pixel, 0, 1)[..., None]
    color = color * (1 - emblem) + 0.97 * emblem
    # Light from the upper left of the image, independent of mirroring.
    side = -1.0 if scene.mirrored else 1.0
    shade = 1.0 - 0.16 * np.clip(0.6 * side * u + 0.8 * v, -1, 1)
    rim = 1.0 - 0.45 * _smooth(distance, -0.13, -0.01)
    return color * (shade * rim)[..., None]


def _smooth(value: Array, low: float, high: float) -> Array:
    """Smoothstep: 0 below `low`, 1 above `high`."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


# Shapes: signed distance functions with outlines within -1..1.


def _circle(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.hypot(u - x, v - y) - radius


def _box(u: Array, v: Array, x: float, y: float, half_width: float, half_height: float, round_by: float) -> Array:
    dx, dy = np.abs(u - x) - half_width + round_by, np.abs(v - y) - half_height + round_by
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - round_by


def _polygon(u: Array, v: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact signed distance to a closed polygon (sign by crossing number)."""
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

# Patterns: share of the second colour at a pixel. Emblems: signed distance functions.


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
