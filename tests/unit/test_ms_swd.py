"""MS-SWD against a naive loop over patches, closed forms, scipy, and the symmetries that define it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_tensors import rng
from scipy.ndimage import convolve1d
from scipy.stats import wasserstein_distance
from skimage.color import rgb2lab

import echodistill_core.losses.ms_swd as module
from benchmarks.literal import literal_ms_swd, sliced_wasserstein
from echodistill_core.errors import InputError
from echodistill_core.losses.color import srgb_to_lab
from echodistill_core.losses.ms_swd import (
    gaussian_pyramid,
    levels_that_fit,
    ms_swd,
    project,
    random_projections,
    sorted_last,
)


def images(*shape, seed=0, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=rng(seed), dtype=torch.float64)


# --- A naive implementation of Eq. 4 with numpy, scipy and scikit-image ---------------------------


def lab_by_skimage(image):
    return rgb2lab(image.permute(1, 2, 0).numpy())


def lab_by_us(image):
    return srgb_to_lab(image[None])[0].permute(1, 2, 0).numpy()


def halve(image):
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        image = convolve1d(image, kernel, axis=axis, mode="mirror")
    return image[::2, ::2]


def naive_projection(image, direction):
    """Dot products of one direction (3, k, k) with the patch around every pixel of an (H, W, 3) image."""
    reach = direction.shape[-1] // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    products = []
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            window = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
            products.append(float((window.transpose(2, 0, 1) * direction).sum()))
    return products


def naive_ms_swd(a, b, seed, levels, count, patch, lab):
    generator, result = rng(seed), []
    a, b = lab(a), lab(b)
    for level in range(levels):
        if level:
            a, b = halve(a), halve(b)
        directions = random_projections(count, patch, generator, dtype=torch.float64).numpy()
        distances = []
        for direction in directions:
            left, right = sorted(naive_projection(a, direction)), sorted(naive_projection(b, direction))
            distances.append(np.mean([abs(x - y) for x, y in zip(left, right, strict=True)]))
        result.append(np.mean(distances))
    return np.mean(result)


@pytest.mark.parametrize(
    # 0.1 % allows for scikit-image's rounded colour constants; with our own conversion the results are equal.
    ("lab", "low", "tolerance"),
    [(lab_by_skimage, 0.0, 1e-3), (lab_by_us, 0.0, 1e-10), (lab_by_us, -1.0, 1e-10)],
)
@pytest.mark.parametrize(
    ("height", "width", "patch", "levels"), [(22, 25, 11, 2), (17, 12, 5, 2), (20, 20, 3, 3)], ids=str
)
def test_agrees_with_a_loop_over_patches(height, width, patch, levels, lab, low, tolerance):
    a = images(2, 3, height, width, seed=1, low=low)
    b = images(2, 3, height, width, seed=2, low=low) ** 2
    actual = ms_swd(a, b, rng(7), levels=levels, projections=3, patch=patch)
    assert actual.shape == (2,)
    for i in range(2):
        expected = naive_ms_swd(a[i], b[i], 7, levels, 3, patch, lab)
        assert actual[i].item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorting_returns_values_and_indices(dtype):
    """Signs, zeros, ties, the smallest and largest numbers, and adjacent floating-point numbers."""
    x = torch.randn(3, 4, 5000, generator=rng(1), dtype=dtype)
    x[0] = x[0].mul(3).round()
    x[1, :, ::2] *= 1e-42
    x[1, 0, :4] = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38], dtype=dtype)
    x[2, :, 1:] = torch.nextafter(x[2, :, :-1], torch.tensor(torch.inf, dtype=dtype))
    values, order = sorted_last(x)
    assert values.dtype == dtype
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, order), values)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(5000).expand(3, 4, -1))


# --- Properties of a distance -------------------------------------------------------------------------


def test_the_distance_is_zero_for_equal_images_only():
    a = images(2, 3, 32, 32)
    assert torch.equal(ms_swd(a, a.clone(), rng()), torch.zeros(2, dtype=torch.float64))
    assert (ms_swd(a, a.flip(1), rng()) > 0).all()


def test_symmetric():
    a, b = images(2, 3, 24, 24, seed=1), images(2, 3, 24, 24, seed=2)
    assert torch.equal(ms_swd(a, b, rng(3)), ms_swd(b, a, rng(3)))


def test_samples_are_independent():
    a, b = images(3, 3, 24, 24, seed=1), images(3, 3, 24, 24, seed=2)
    separate = torch.cat([ms_swd(a[i : i + 1], b[i : i + 1], rng(3)) for i in range(3)])
    torch.testing.assert_close(ms_swd(a, b, rng(3)), separate)
    assert separate.unique().numel() == 3


def test_constant_images_have_the_closed_form():
    # Each projection map is constant: |sum over channels of the Lab difference times the direction's sum|.
    one, two = (0.2, 0.5, 0.9), (0.7, 0.4, 0.1)
    a, b = (torch.tensor(c, dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 48, 48) for c in (one, two))
    difference = rgb2lab(np.array(one)) - rgb2lab(np.array(two))
    generator, expected = rng(5), []
    for _ in range(3):
        sums = random_projections(16, 11, generator, dtype=torch.float64).sum(dim=(2, 3)).numpy()
        expected.append(np.abs(sums @ difference).mean())
    actual = ms_swd(a, b, rng(5), levels=3, projections=16)
    assert actual.item() == pytest.approx(np.mean(expected), rel=1e-3)


def test_sliced_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(2, 5, 100, generator=rng(), dtype=torch.float64)
    shift = torch.tensor([[-3.0, 0.5, 0, 2, 10], [1, 1, 1, 1, -1]], dtype=torch.float64)
    torch.testing.assert_close(sliced_wasserstein(x, x + shift[..., None]), shift.abs().mean(1))


def test_sliced_wasserstein_agrees_with_scipy():
    a, b = (torch.randn(2, 4, 50, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    expected = [
        np.mean([wasserstein_distance(x, y) for x, y in zip(a[i].numpy(), b[i].numpy(), strict=True)]) for i in range(2)
    ]
    np.testing.assert_allclose(sliced_wasserstein(a, b).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3000, 2**23])
@pytest.mark.parametrize("requires_grad", [(True, False), (False, True), (True, True)])
def test_value_and_gradients_agree_with_autograd_over_whole_maps(monkeypatch, requires_grad, chunk):
    """For every chunk size of projections, with a different upstream gradient for each sample."""
    monkeypatch.setattr(module, "_MAP_NUMBERS", chunk)
    upstream = torch.tensor([0.3, -2.0], dtype=torch.float64)

    def value_and_gradients(distance):
        pair = [images(2, 3, 23, 30, seed=i).requires_grad_(flag) for i, flag in enumerate(requires_grad)]
        value = distance(*pair, rng(5), 5, 7)
        value.backward(upstream)
        return value.detach(), *(x.grad for x in pair)

    actual, expected = value_and_gradients(ms_swd), value_and_gradients(literal_ms_swd)
    for own, reference, flag in zip(actual, expected, (True, *requires_grad), strict=True):
        assert (own is not None) == flag
        if flag:
            torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-12)


def test_the_graph_saves_no_map_of_projections():
    saved = []
    a, b = images(1, 3, 32, 32, seed=1).requires_grad_(), images(1, 3, 32, 32, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ms_swd(a, b, rng(), projections=64)
    assert max(saved) < 64 * 32 * 32


# --- Invariance to the position of patches --------------------------------------------------------


def test_invariant_to_shuffled_projections():
    a, b = (torch.randn(2, 4, 300, generator=rng(seed)) for seed in (1, 2))
    shuffled = a[..., torch.randperm(300, generator=rng(3))]
    assert torch.equal(sliced_wasserstein(shuffled, b), sliced_wasserstein(a, b))
    assert not torch.equal((shuffled - b).abs().mean(), (a - b).abs().mean())


def test_invariant_to_shuffled_patches():
    a, b = images(1, 3, 20, 18, seed=1), images(1, 3, 20, 18, seed=2)
    directions = random_projections(6, 5, rng(), dtype=torch.float64)
    patches = F.unfold(F.pad(a, (2, 2, 2, 2), mode="reflect"), 5)  # (1, 75, 360): the patches themselves, as columns
    shuffled = patches[..., torch.randperm(patches.shape[-1], generator=rng(3))]
    products = directions.reshape(6, -1) @ shuffled
    expected = sliced_wasserstein(project(a, directions).flatten(2), project(b, directions).flatten(2))
    torch.testing.assert_close(sliced_wasserstein(products, project(b, directions).flatten(2)), expected)


def test_shuffled_pixels_change_patches_larger_than_a_pixel_only():
    a, b = images(1, 3, 16, 16, seed=1).cumsum(-1) / 16, images(1, 3, 16, 16, seed=2)
    shuffled = a.flatten(2)[..., torch.randperm(256, generator=rng(3))].reshape(a.shape)
    torch.testing.assert_close(
        ms_swd(shuffled, b, rng(4), levels=1, patch=1), ms_swd(a, b, rng(4), levels=1, patch=1), rtol=1e-10, atol=0
    )
    apart = ms_swd(shuffled, b, rng(4), levels=1, patch=5) - ms_swd(a, b, rng(4), levels=1, patch=5)
    assert apart.abs().item() > 0.1


# --- Projections ----------------------------------------------------------------------------------


def test_projections_have_unit_length_and_no_preferred_direction():
    directions = random_projections(4000, 3, rng())
    assert directions.shape == (4000, 3, 3, 3)
    torch.testing.assert_close(directions.flatten(1).norm(dim=1), torch.ones(4000))
    # Uniform on the sphere in 27 dimensions: mean 0 and covariance I / 27.
    flat = directions.flatten(1).double()
    assert flat.mean(0).abs().max() < 5 * (1 / 27 / 4000) ** 0.5
    torch.testing.assert_close(flat.T @ flat / 4000, torch.eye(27, dtype=torch.float64) / 27, atol=3e-3, rtol=0)


def test_projections_depend_on_the_generator_only():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, generator = random_projections(4, 5, rng(1)), random_projections(4, 5, rng(1)), rng(1)
    assert torch.equal(first, again)
    assert torch.equal(first, random_projections(4, 5, generator))
    assert not torch.equal(first, random_projections(4, 5, generator))
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_generators_give_equal_distances_and_each_call_advances_the_generator():
    a, b, generator = images(1, 3, 24, 24, seed=1), images(1, 3, 24, 24, seed=2), rng(9)
    first, second = ms_swd(a, b, generator), ms_swd(a, b, generator)
    assert torch.equal(first, ms_swd(a, b, rng(9)))
    assert not torch.equal(first, second)


def test_images_share_projections_and_levels_have_their_own():
    generator = rng(2)
    ms_swd(images(1, 3, 48, 48), images(1, 3, 48, 48), generator, projections=7)
    expected = rng(2)
    drawn = [random_projections(7, 11, expected) for _ in range(3)]  # one draw for each of the three levels that fit
    assert torch.equal(generator.get_state(), expected.get_state())
    assert not torch.equal(drawn[0], drawn[1])


def test_project_keeps_the_size():
    assert project(images(2, 3, 13, 17), random_projections(4, 11, rng(), dtype=torch.float64)).shape == (2, 4, 13, 17)


def test_project_rejects_even_patch_sizes():
    with pytest.raises(InputError, match="4 pixels; expected an odd"):
        project(images(1, 3, 8, 8), random_projections(2, 4, rng(), dtype=torch.float64))


# --- Pyramid --------------------------------------------------------------------------------------


def test_pyramid_agrees_with_scipy_on_odd_and_even_sides():
    x = images(2, 3, 21, 32)
    pyramid = gaussian_pyramid(x, 4)
    assert [tuple(level.shape[-2:]) for level in pyramid] == [(21, 32), (11, 16), (6, 8), (3, 4)]
    assert torch.equal(pyramid[0], x)
    for i in range(2):
        expected = x[i].permute(1, 2, 0).numpy()
        for level in pyramid[1:]:
            expected = halve(expected)
            np.testing.assert_allclose(level[i].permute(1, 2, 0).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "levels", "patch", "expected"),
    [
        ((64, 64), 5, 11, 3),  # 64, 32, 16; 8 is too small
        ((512, 512), 5, 11, 5),
        ((512, 512), 2, 11, 2),
        ((512, 40), 5, 11, 2),  # the shorter side decides: 40, 20; 10 is too small
        ((41, 512), 5, 11, 3),  # halving rounds up: 41, 21, 11
        ((11, 11), 5, 11, 1),
        ((5, 5), 9, 1, 3),  # 5, 3, 2; two pixels cannot be blurred with reflection
    ],
)
def test_levels_that_fit(size, levels, patch, expected):
    assert levels_that_fit(*size, levels, patch) == expected
    pyramid = gaussian_pyramid(torch.zeros(1, 1, *size), expected)
    assert len(pyramid) == expected
    assert min(pyramid[-1].shape[-2:]) >= patch


def test_an_image_smaller_than_a_patch_is_rejected():
    with pytest.raises(InputError, match="32 x 10 pixels"):
        levels_that_fit(10, 32, 5, 11)
    with pytest.raises(InputError, match="swd_weight"):
        ms_swd(images(1, 3, 8, 8), images(1, 3, 8, 8), rng())


def test_different_shapes_are_rejected():
    with pytest.raises(InputError, match="expected equal shapes"):
        ms_swd(images(1, 3, 16, 16), images(2, 3, 16, 16), rng())


# --- Gradients and precision ----------------------------------------------------------------------


def test_gradient_agrees_with_finite_differences():
    # Values in [-1, 1], as in the reference code, also cover the linear part of the colour curve below zero.
    a, b = (images(1, 3, 7, 6, seed=seed, low=-1.0).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda x, y: ms_swd(x, y, rng(3), levels=2, projections=3, patch=3), (a, b))


def test_gradient_descent_reduces_the_distance_and_an_image_without_grad_gets_none():
    a, b = images(1, 3, 24, 24, seed=1).float().requires_grad_(), images(1, 3, 24, 24, seed=2).float() ** 2
    before = ms_swd(a, b, rng(3))
    before.sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad is None
    step = 0.1 * before.item() / a.grad.square().sum()  # to first order this reduces the distance by a tenth
    after = ms_swd((a - step * a.grad).detach(), b, rng(3))
    assert after.item() < 0.97 * before.item()


def test_half_precision_images_are_compared_in_float32():
    a, b = images(1, 3, 24, 24, seed=1).bfloat16(), images(1, 3, 24, 24, seed=2).bfloat16()
    expected = ms_swd(a.double(), b.double(), rng(3))
    actual = ms_swd(a, b, rng(3))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_autocast_does_not_reduce_precision():
    a, b = images(1, 3, 24, 24, seed=1).float(), images(1, 3, 24, 24, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ms_swd(a, b, rng(3))
    assert torch.equal(inside, ms_swd(a, b, rng(3)))
