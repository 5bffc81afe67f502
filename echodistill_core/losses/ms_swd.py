"""Eq. 4: the multi-scale sliced Wasserstein distance between images, after He et al., ECCV 2024.

"Multiscale Sliced Wasserstein Distances as Perceptual Color Difference Measures": both images go to CIELAB and into a
Gaussian pyramid. At each level every patch is projected onto random unit directions; the distance is the mean over
directions of the one-dimensional Wasserstein-1 distance between both images' projections. As only sorted projections
are compared, it does not matter where in the image a patch lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError
from .color import srgb_to_lab

_MAP_NUMBERS = 2**23  # of the projections at once, 32 MB in float32 and 64 MB for their order
_PLACES = 2**28  # the most that a float64 can carry beside a float32
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def ms_swd(
    a: Tensor, b: Tensor, generator: torch.Generator, levels: int = 5, projections: int = 128, patch: int = 11
) -> Tensor:
    """MS-SWD of each pair of images: (B,), 0 for equal images, in units of CIELAB seen through unit projections.

    a, b: (B, 3, H, W) of one shape, taken as sRGB, nominally [0, 1]; other ranges are the caller's decision.
    generator: draws new projections for every level, finest first, on every call. a and b share them.
    levels: of the pyramid, as far as the image is large enough (`levels_that_fit`). patch: odd, in pixels.
    The gradient flows to a, and to b where it requires one. Computes in float32, or in float64 for float64 images.
    Raises InputError for different shapes, or an image smaller than one patch.
    """
    _check_shapes(a, b)
    drawn = draw_directions(
        a.shape[-2],
        a.shape[-1],
        generator,
        levels=levels,
        projections=projections,
        patch=patch,
        dtype=torch.promote_types(a.dtype, torch.float32),
    )
    return ms_swd_along(a, b, [directions.to(a.device) for directions in drawn])


def ms_swd_along(a: Tensor, b: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """MS-SWD (B,) of images along given directions, one tensor (P, 3, patch, patch) a level, finest first."""
    _check_shapes(a, b)
    pyramids = (gaussian_pyramid(srgb_to_lab(x), len(directions)) for x in (a, b))
    distances = [
        _LevelDistance.apply(level_a, level_b, own) for level_a, level_b, own in zip(*pyramids, directions, strict=True)
    ]
    return torch.stack(distances).mean(0)


def draw_directions(
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    levels: int,
    projections: int,
    patch: int = 11,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Directions for every level that fits images of this size, finest first, as `random_projections` draws them.

    Raises InputError for an image smaller than one patch.
    """
    fitting = levels_that_fit(height, width, levels, patch)
    return [random_projections(projections, patch, generator, dtype=dtype) for _ in range(fitting)]


def levels_that_fit(height: int, width: int, levels: int, patch: int) -> int:
    """How many of `levels` pyramid levels have a shorter side of at least one patch: 3 of 5 for 64 x 64 and patch 11.

    Raises InputError where even the image itself is smaller than a patch.
    """
    side = min(height, width)
    if side < patch:
        raise InputError(
            f"MS-SWD got an image of {width} x {height} pixels; expected at least {patch} x {patch}, the size of its"
            " patches: raise the resolution, or set swd_weight to 0."
        )
    fitting = 1
    # Halving rounds up. Blurring with reflection needs 3 pixels, so that even with 1-pixel patches no level is below 2.
    while fitting < levels and (side := (side + 1) // 2) >= max(patch, 2):
        fitting += 1
    return fitting


def gaussian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """The images (B, C, H, W) and their successive halvings, finest first: `levels` tensors, the first is x itself.

    Each halving blurs with the binomial kernel [1, 4, 6, 4, 1] / 16 per axis, reflecting at the edges, and keeps every
    second pixel from the first on: a side of n pixels becomes ceil(n / 2). Each side must have 3 pixels to be halved.
    """
    pyramid = [x]
    for _ in range(levels - 1):
        pyramid.append(_halve(_halve(pyramid[-1]).mT).mT)  # the last axis, then the other
    return pyramid


def random_projections(
    count: int,
    patch: int,
    generator: torch.Generator,
    *,
    channels: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Directions drawn uniformly from the unit sphere of patches: (count, channels, patch, patch), each of L2 norm 1.

    They are drawn and scaled on the generator's device, in float32 numbers, and then moved to `device` (default: they
    stay), so that a seed means the same directions on every device.
    """
    directions = torch.randn(count, channels * patch * patch, generator=generator, device=generator.device)
    # A normal vector has no preferred direction, so scaling it to length 1 is uniform on the sphere.
    directions = F.normalize(directions.to(dtype), dim=1)
    return directions.reshape(count, channels, patch, patch).to(device)


def project(x: Tensor, projections: Tensor) -> Tensor:
    """The dot product of each direction with the patch around each pixel: (B, C, H, W) to (B, P, H, W).

    projections: (P, C, patch, patch), of x's dtype and device. Patches reach over the edges into the reflected image.
    Raises InputError for an even patch, which has no middle pixel.
    """
    patch = projections.shape[-1]
    if patch % 2 == 0:
        raise InputError(f"MS-SWD got patches of {patch} pixels; expected an odd number, as 11.")
    x = F.pad(x, [patch // 2] * 4, mode="reflect")
    # Autocast would round to bfloat16, and the differences between sorted neighbours are finer than that. On CUDA this
    # is a TF32 convolution unless torch.backends.cudnn.allow_tf32 is off, as all float32 convolutions are.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, projections)


def sorted_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """x sorted along its last axis, and the places that the values came from (int64)."""
    if x.device.type != "cpu":
        values, order = x.sort(dim=-1)
        return values, order
    # numpy sorts in vector instructions, on a CPU in a tenth of torch's time.
    if x.dtype != torch.float32 or x.shape[-1] > _PLACES:
        order = torch.from_numpy(np.argsort(x.numpy(), axis=-1))
        return x.gather(-1, order), order
    # Sorting numbers alone takes half of what sorting places by them does, so each number carries its place: a float32
    # leaves the last 29 bits of a float64's mantissa empty. Written there, a place below 2^28 changes the order of
    # equal numbers only, and rounding takes it off again.
    carriers = x.numpy().astype(np.float64)
    bits = carriers.view(np.int64)
    bits |= np.arange(x.shape[-1])
    carriers.sort(axis=-1)
    return torch.from_numpy(carriers).float(), torch.from_numpy(bits & (2 * _PLACES - 1))


def sorted_values(x: Tensor) -> Tensor:
    """x sorted along its last axis, without the order."""
    return x.sort(dim=-1).values if x.device.type != "cpu" else torch.from_numpy(np.sort(x.numpy(), axis=-1))


class _LevelDistance(torch.autograd.Function):
    """Sliced Wasserstein distance (B,) of one pyramid level: CIELAB a, b (B, 3, h, w), directions (P, 3, patch, patch).

    In one dimension the best transport pairs the sorted numbers: W1 = mean |sort(a) - sort(b)|; the distance is its
    mean over P. A projection's gradient is the sign of its difference to its partner, so the gradient of the images is
    known as soon as the distance is. It is all that is kept: the maps, of B * P * h * w numbers each, and the orders,
    twice as large, are made for a few projections at a time and forgotten.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
        """The distance, (B,). The images' gradient is made with it and kept for `backward`."""
        wanted = ctx.needs_input_grad[:2]
        gradients = [torch.zeros_like(x) if want else torch.empty(0) for x, want in zip((a, b), wanted, strict=True)]
        distance = a.new_zeros(len(a))
        share = 1 / (len(directions) * a.shape[-2] * a.shape[-1])
        for some in directions.split(max(1, _MAP_NUMBERS // a[:, 0].numel())):
            # Projecting is linear, so its backward pass needs nothing but the directions.
            images = [x.detach().requires_grad_(want) for x, want in zip((a, b), wanted, strict=True)]
            with torch.enable_grad():
                maps = [project(x, some) for x in images]
            ordered = [
                sorted_last(m.detach().flatten(2)) if want else (sorted_values(m.detach().flatten(2)), None)
                for m, want in zip(maps, wanted, strict=True)
            ]
            difference = ordered[0][0] - ordered[1][0]
            distance += difference.abs().sum(dim=(1, 2)) * share
            sign = difference.sign_() * share
            for i, (image, m, (_, order)) in enumerate(zip(images, maps, ordered, strict=True)):
                if order is not None:
                    own = torch.empty_like(sign).scatter_(-1, order, sign if i == 0 else -sign)
                    gradients[i] += torch.autograd.grad(m, image, own.view_as(m))[0]
        ctx.save_for_backward(*gradients)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The images' gradient, times each sample's share."""
        a, b = (g * upstream.reshape(-1, 1, 1, 1) if g.numel() else None for g in ctx.saved_tensors)
        return a, b, None


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"MS-SWD got images of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected equal shapes:"
            " resize one of them."
        )


def _halve(x: Tensor) -> Tensor:
    """Blur the last axis of (B, C, H, W) with the binomial kernel and keep every second pixel."""
    kept = (x.shape[-1] + 1) // 2
    x = F.pad(x, (2, 2, 0, 0), mode="reflect")
    # Scaled slices instead of a convolution: the backward pass keeps nothing, and autocast leaves them in float32.
    first, *others = (weight * x[..., i : i + 2 * kept - 1 : 2] for i, weight in enumerate(_BINOMIAL))
    return sum(others, start=first)
