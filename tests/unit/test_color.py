"""sRGB to CIELAB against scikit-image, published values and finite differences."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from echodistill_core.losses.color import srgb_to_lab

# scikit-image rounds its matrix and its knees to other digits: L*, a*, b* of one colour differ by up to this much.
ROUNDING = 0.02


def pixel(*rgb, dtype=torch.float64):
    return torch.tensor(rgb, dtype=dtype).reshape(1, 3, 1, 1)


def uniform(*shape, low=0.0, high=1.0, seed=0):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_agrees_with_scikit_image():
    x = uniform(2, 3, 40, 30)
    x[1] *= 0.02  # dark colours: both linear pieces
    expected = rgb2lab(x.permute(0, 2, 3, 1).numpy())
    actual = srgb_to_lab(x).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(actual, expected, atol=ROUNDING)


def test_every_corner_of_the_cube_agrees_with_scikit_image():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    expected = rgb2lab(corners.numpy())
    actual = srgb_to_lab(corners.T.reshape(1, 3, 8, 1)).reshape(3, 8).T.numpy()
    np.testing.assert_allclose(actual, expected, atol=ROUNDING)


def test_neutral_greys_have_no_colour_and_white_is_100():
    greys = torch.linspace(-1, 2, 50, dtype=torch.float64).reshape(1, 1, 50, 1).expand(1, 3, 50, 1)
    assert srgb_to_lab(greys)[:, 1:].abs().max() < 1e-10
    assert srgb_to_lab(pixel(1, 1, 1))[0, 0].item() == pytest.approx(100, abs=1e-10)
    assert srgb_to_lab(pixel(0, 0, 0)).abs().max() < 1e-10


def test_negative_values_extend_the_line_below_zero():
    # Below both knees a grey's L* is a line through black: 116 * 841/108 * x / 12.92, by hand.
    for x in (-1.0, -0.3, 0.001):
        assert srgb_to_lab(pixel(x, x, x))[0, 0].item() == pytest.approx(116 * 841 / 108 * x / 12.92, rel=1e-9)


def test_values_above_one_extend_the_powers():
    linear = ((1.5 + 0.055) / 1.055) ** 2.4
    assert srgb_to_lab(pixel(1.5, 1.5, 1.5))[0, 0].item() == pytest.approx(116 * linear ** (1 / 3) - 16, rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 0.05), (1, 1.5)])
def test_gradient_agrees_with_finite_differences(low, high):
    x = uniform(1, 3, 4, 4, low=low, high=high).requires_grad_()
    assert torch.autograd.gradcheck(srgb_to_lab, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_is_finite_everywhere_and_never_lost(dtype):
    values = torch.tensor([-1e3, -1, -0.055, -0.0551, -1e-20, 0, 1e-20, 0.0031308, 0.04045, 0.0405, 1, 1.5, 1e3])
    x = torch.cartesian_prod(values, values, values).T.reshape(1, 3, -1, 1).to(dtype).requires_grad_()
    gradients = [torch.autograd.grad(srgb_to_lab(x)[:, i].sum(), x)[0] for i in range(3)]
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert (gradients[0] > 0).all()  # L* rises with every channel of every colour


def test_half_precision_is_computed_in_float32():
    x = uniform(1, 3, 8, 8).bfloat16()
    lab = srgb_to_lab(x)
    assert lab.dtype == torch.float32
    torch.testing.assert_close(lab.double(), srgb_to_lab(x.double()), atol=1e-3, rtol=0)


def test_autocast_does_not_round():
    x = uniform(1, 3, 8, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = srgb_to_lab(x)
    assert torch.equal(inside, srgb_to_lab(x))
