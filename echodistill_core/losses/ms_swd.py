"""Eq. 4: the multi-scale sliced Wasserstein distance (MS-SWD) between images, after He et al., ECCV 2024,
"Multiscale Sliced Wasserstein Distances as Perceptual Color Difference Measures".

    MS-SWD(a, b) = mean_l mean_p W1(project(a_l, d_lp), project(b_l, d_lp))

a_l, b_l: level l of the Gaussian pyramids of both images in CIELAB. d_lp: random unit directions in the space of
patches. project: the dot product of a direction with the patch around every pixel. W1: the Wasserstein-1 distance of
the two sets of projections, in one dimension the mean difference of the sorted numbers; it ignores the position of a
patch in the image.
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

_MAP_NUMBERS = 2**23  # projections computed at once: 32 MB in float32, and 64 MB for the int64 indices of sorting
_MAX_INDICES = 2**28  # indices that fit into the unused mantissa bits of a float32 stored as float64
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def ms_swd(
    a: Tensor, b: Tensor, generator: torch.Generator, levels: int = 5, projections: int = 128, patch: int = 11
) -> Tensor:
    """MS-SWD of each pair of images, (B,), 0 or more, in units of CIELAB.

    a, b: (B, 3, H, W) of equal shape, interpreted as sRGB, nominally in [0, 1]; other ranges are not refused.
    generator: draws new directions in every call, for the finest level first. Both images share them.
    levels: of the pyramid; levels smaller than a patch are left out (`levels_that_fit`). projections: directions per
    level. patch: side in pixels, odd.
    Gradients flow to a and b. Computes in float32, or in float64 for float64 images.
    Raises InputError for different shapes, an even patch, or an image smaller than one patch.
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
    """MS-SWD (B,) of images (B, 3, H, W) along given directions: a tensor (P, 3, patch, patch) per level, finest first.

    Raises InputError for different shapes and for an even patch.
    """
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
    """`random_projections` for every pyramid level of images of this size, finest first.

    Raises InputError for an image smaller than one patch.
    """
    count = levels_that_fit(height, width, levels, patch)
    return [random_projections(projections, patch, generator, dtype=dtype) for _ in range(count)]


def levels_that_fit(height: int, width: int, levels: int, patch: int) -> int:
    """The number of pyramid levels, at most `levels`, whose shorter side is one patch or more: 3 for 64 x 64, patch 11.

    Raises InputError if the image itself is smaller than a patch.
    """
    side = min(height, width)
    if side < patch:
        raise InputError(
            f"MS-SWD got an image of {width} x {height} pixels; expected at least {patch} x {patch}, the size of its"
            " patches: raise the resolution, or set swd_weight to 0."
        )
    count = 1
    # Halving rounds up. Reflection padding needs 3 pixels, so a level has 2 or more even with patches of 1 pixel.
    while count < levels and (side := (side + 1) // 2) >= max(patch, 2):
        count += 1
    return count


def gaussian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """The Gaussian pyramid of images x (B, C, H, W): `levels` tensors, the first of which is x.

    Each level is the previous one, blurred along both axes with the binomial kernel [1, 4, 6, 4, 1] / 16 and reflection
    padding, and subsampled by 2 from the first pixel on: n pixels become ceil(n / 2). A side needs 3 pixels or more.
    """
    pyramid = [x]
    for _ in range(levels - 1):
        pyramid.append(_halve(_halve(pyramid[-1]).mT).mT)  # width, then height
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
    """Directions (count, channels, patch, patch) of L2 norm 1, uniform on the unit sphere.

    They are drawn in float32 and normalised on the generator's device, and then moved to `device` (None: not moved).
    With a CPU generator, a seed gives the same directions for every device.
    """
    directions = torch.randn(count, channels * patch * patch, generator=generator, device=generator.device)
    # The standard normal distribution is rotation invariant, so normalised vectors are uniform on the sphere.
    directions = F.normalize(directions.to(dtype), dim=1)
    return directions.reshape(count, channels, patch, patch).to(device)


def project(x: Tensor, projections: Tensor) -> Tensor:
    """The dot products of directions with the patch around every pixel: (B, C, H, W) to (B, P, H, W).

    projections: directions (P, C, patch, patch) in x's dtype, on its device. Images are padded by reflection.
    Raises InputError for an even patch, which has no centre pixel.
    """
    patch = projections.shape[-1]
    if patch % 2 == 0:
        raise InputError(f"MS-SWD got patches of {patch} pixels; expected an odd number, as 11.")
    x = F.pad(x, [patch // 2] * 4, mode="reflect")
    # Without autocast: bfloat16 is coarser than the differences of sorted neighbours. On CUDA, as for all float32
    # convolutions, torch.backends.cudnn.allow_tf32 decides on TF32.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, projections)


def sorted_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """x sorted along its last axis, and the indices (int64) of the sorted values in x, as torch.sort returns them."""
    if x.device.type != "cpu":
        values, order = x.sort(dim=-1)
        return values, order
    # On a CPU, numpy sorts with vector instructions, in a tenth of torch's time.
    if x.dtype != torch.float32 or x.shape[-1] > _MAX_INDICES:
        order = torch.from_numpy(np.argsort(x.numpy(), axis=-1))
        return x.gather(-1, order), order
    # np.sort takes half the time of np.argsort, so the index is stored in the number: a float32 stored as float64
    # leaves the last 29 bits of the mantissa 0. An index below 2^28 in these bits changes only the order of equal
    # numbers, and rounding to float32 removes it.
    numbers = x.numpy().astype(np.float64)
    bits = numbers.view(np.int64)
    bits |= np.arange(x.shape[-1])
    numbers.sort(axis=-1)
    return torch.from_numpy(numbers).float(), torch.from_numpy(bits & (2 * _MAX_INDICES - 1))


def sorted_values(x: Tensor) -> Tensor:
    """x sorted along its last axis."""
    return x.sort(dim=-1).values if x.device.type != "cpu" else torch.from_numpy(np.sort(x.numpy(), axis=-1))


class _LevelDistance(torch.autograd.Function):
    """Sliced Wasserstein distance (B,) of one pyramid level: CIELAB a, b (B, 3, h, w), directions (P, 3, patch, patch).

        W1(u, v) = mean_i |sort(u)_i - sort(v)_i|        distance = mean_p W1(project(a, d_p), project(b, d_p))

    dW1/du_i is the sign of the difference between u_i and its partner in sorted order, so forward already computes the
    gradient of the images, and backward only scales it. The projections, B * P * h * w numbers, and their indices, of
    twice that size, therefore exist for a few directions at a time.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
        """The distance, (B,). Saves the gradient of the images for `backward`."""
        needed = ctx.needs_input_grad[:2]
        gradients = [torch.zeros_like(x) if need else torch.empty(0) for x, need in zip((a, b), needed, strict=True)]
        distance = a.new_zeros(len(a))
        share = 1 / (len(directions) * a.shape[-2] * a.shape[-1])
        for chunk in directions.split(max(1, _MAP_NUMBERS // a[:, 0].numel())):
            # `project` is linear: autograd stores only the directions for its backward pass.
            images = [x.detach().requires_grad_(need) for x, need in zip((a, b), needed, strict=True)]
            with torch.enable_grad():
                maps = [project(x, chunk) for x in images]
            ordered = [
                sorted_last(m.detach().flatten(2)) if need else (sorted_values(m.detach().flatten(2)), None)
                for m, need in zip(maps, needed, strict=True)
            ]
            difference = ordered[0][0] - ordered[1][0]
            distance += difference.abs().sum(dim=(1, 2)) * share
            sign = difference.sign_() * share
            for i, (image, m, (_, order)) in enumerate(zip(images, maps, ordered, strict=True)):
                if order is not None:
                    unsorted = torch.empty_like(sign).scatter_(-1, order, sign if i == 0 else -sign)
                    gradients[i] += torch.autograd.grad(m, image, unsorted.view_as(m))[0]
        ctx.save_for_backward(*gradients)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The saved gradients, scaled by the upstream gradient (B,)."""
        a, b = (g * upstream.reshape(-1, 1, 1, 1) if g.numel() else None for g in ctx.saved_tensors)
        return a, b, None


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"MS-SWD got images of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected equal shapes:"
            " resize one of them."
        )


def _halve(x: Tensor) -> Tensor:
    """Blur the last axis of (B, C, H, W) with the binomial kernel and subsample it by 2."""
    size = (x.shape[-1] + 1) // 2
    x = F.pad(x, (2, 2, 0, 0), mode="reflect")
    # Scaled slices instead of a convolution: they save no tensors for backward, and autocast does not change them.
    first, *others = (weight * x[..., i : i + 2 * size - 1 : 2] for i, weight in enumerate(_BINOMIAL))
    return sum(others, start=first)
