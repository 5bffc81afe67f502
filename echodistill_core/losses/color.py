"""Differentiable conversion from sRGB to CIELAB, the colour space of MS-SWD."""

from __future__ import annotations

import torch
from torch import Tensor

# Linear sRGB to CIE XYZ (IEC 61966-2-1 primaries, D65, 2 degree observer; B. Lindbloom's seven digits). The sums of the
# rows are used as the white point, so that neutral greys have exactly a* = b* = 0.
_RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_SRGB_KNEE = 0.04045
_LAB_DELTA = 6 / 29


def srgb_to_lab(x: Tensor) -> Tensor:
    """CIELAB (D65, 2 degree observer) of sRGB images.

    x: (B, 3, H, W), nominally in [0, 1]. Outside this range both transfer curves are extrapolated: linearly below 0,
    as powers above 1.
    Returns (B, 3, H, W) in float32, or float64 for a float64 x: L* in 0..100 and a*, b* in about -110..110 for x in
    range. The gradient is finite for every finite x.
    """
    linear = _srgb_to_linear(x.to(torch.promote_types(x.dtype, torch.float32)))
    r, g, b = linear.unbind(1)
    # Sums of scaled channels instead of a matrix product, which autocast would compute in bfloat16.
    fx, fy, fz = (_lab_curve((m[0] * r + m[1] * g + m[2] * b) / sum(m)) for m in _RGB_TO_XYZ)
    return torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=1)


# Both curves below are a power above a threshold (knee) and linear below it. The argument of the power is clamped at
# the knee: torch.where multiplies the gradient of the branch not taken by 0, and the gradient of a root is infinite at
# 0 and NaN below, so the product would be NaN.


def _srgb_to_linear(x: Tensor) -> Tensor:
    """The inverse of sRGB's transfer curve (IEC 61966-2-1), elementwise."""
    power = ((x.clamp(min=_SRGB_KNEE) + 0.055) / 1.055) ** 2.4
    return torch.where(x > _SRGB_KNEE, power, x / 12.92)


def _lab_curve(t: Tensor) -> Tensor:
    """CIE 15's f(t) for t relative to white: the cube root, and its tangent below (6/29)^3, elementwise."""
    knee = _LAB_DELTA**3
    root = t.clamp(min=knee) ** (1 / 3)
    return torch.where(t > knee, root, t / (3 * _LAB_DELTA**2) + 4 / 29)
