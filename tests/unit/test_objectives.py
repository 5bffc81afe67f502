"""Eq. 1, 2, 3 and 5 against loops, closed forms and diffusers' schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from random_tensors import normal

from echodistill_core.losses.objectives import alignment_weight, identity_loss, latent_mse, masked_mse

# --- Eq. 2: identity ------------------------------------------------------------------------------


def test_identity_agrees_with_cosines_by_hand():
    student, teacher = normal(3, 4, 768, seed=1), normal(3, 4, 768, seed=2)
    s, t = student.double().numpy(), teacher.double().numpy()
    expected = [
        1 - np.mean([s[i, k] @ t[i, k] / np.sqrt((s[i, k] @ s[i, k]) * (t[i, k] @ t[i, k])) for k in range(4)])
        for i in range(3)
    ]
    actual = identity_loss(student, teacher)
    assert actual.shape == (3,)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


def test_identity_of_equal_orthogonal_and_opposite_tokens():
    x = normal(2, 4, 768)
    torch.testing.assert_close(identity_loss(x, x), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(identity_loss(x, -x), torch.full((2,), 2.0))
    even, odd = torch.zeros(2, 4, 768), torch.zeros(2, 4, 768)
    even[..., ::2], odd[..., 1::2] = normal(2, 4, 384, seed=1), normal(2, 4, 384, seed=2)
    assert torch.equal(identity_loss(even, odd), torch.ones(2))


def test_identity_ignores_the_length_of_each_token():
    student, teacher = normal(2, 4, 768, seed=1), normal(2, 4, 768, seed=2)
    lengths = torch.tensor([0.01, 1, 7, 1000]).reshape(1, 4, 1)
    torch.testing.assert_close(identity_loss(student * lengths, teacher), identity_loss(student, teacher))
    torch.testing.assert_close(identity_loss(student, teacher * lengths), identity_loss(student, teacher))


def test_identity_compares_tokens_in_their_order():
    student, teacher = normal(1, 4, 768), normal(1, 4, 768)
    assert identity_loss(student, teacher.flip(1)).item() > 0.5 > identity_loss(student, teacher).item()


def test_identity_gradient_stays_across_the_token():
    # A cosine does not change along its argument, so its gradient is orthogonal to each token.
    student, teacher = normal(1, 4, 768, seed=1).requires_grad_(), normal(1, 4, 768, seed=2)
    identity_loss(student, teacher).sum().backward()
    along = (student.grad * student).sum(-1) / student.grad.norm(dim=-1) / student.norm(dim=-1)
    assert along.abs().max().item() < 1e-5
    assert student.grad.norm(dim=-1).min().item() > 0


# --- Eq. 3: latents -------------------------------------------------------------------------------


def test_latent_mse_agrees_with_a_loop():
    a, b = normal(2, 4, 5, 6, seed=1), normal(2, 4, 5, 6, seed=2)
    expected = [
        sum((float(x) - float(y)) ** 2 for x, y in zip(a[i].flatten(), b[i].flatten(), strict=True)) / 120
        for i in (0, 1)
    ]
    np.testing.assert_allclose(latent_mse(a, b).numpy(), expected, rtol=1e-5)


# --- Eq. 5: c(t) ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alphas_cumprod():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_weight_by_t_is_the_closed_form_of_the_schedule(alphas_cumprod):
    expected = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)
    weight = alignment_weight(alphas_cumprod, torch.arange(1000), by_t=True)
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-4)
    ends = alignment_weight(alphas_cumprod, torch.tensor([999, 0]), by_t=True)
    assert ends.tolist() == pytest.approx([0.0046601, 0.99915], rel=1e-5)


def test_weight_without_t_is_one(alphas_cumprod):
    weight = alignment_weight(alphas_cumprod, torch.tensor([0, 500, 999]), by_t=False)
    assert torch.equal(weight, torch.ones(3))


# --- Eq. 1: the valid region ----------------------------------------------------------------------


@pytest.fixture
def masked():
    prediction, target, mask = normal(3, 4, 6, 5, seed=1), normal(3, 4, 6, 5, seed=2), torch.zeros(3, 1, 6, 5)
    mask[0, :, 2:4, 1:3] = 1  # 4 valid pixels
    mask[1] = 1  # all 30
    mask[2, :, 0, 0] = 1  # one
    return prediction, target, mask


def test_masked_mse_agrees_with_a_loop(masked):
    prediction, target, mask = masked
    means = []
    for i in range(3):
        squares = [
            (float(prediction[i, c, y, x]) - float(target[i, c, y, x])) ** 2
            for c in range(4)
            for y in range(6)
            for x in range(5)
            if mask[i, 0, y, x] == 1
        ]
        means.append(sum(squares) / len(squares))
    assert masked_mse(prediction, target, mask).item() == pytest.approx(sum(means) / 3, rel=1e-5)


def test_masked_mse_with_everything_valid_is_the_mse(masked):
    prediction, target, mask = masked
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(masked_mse(prediction, target, torch.ones_like(mask)), expected)


def test_masked_pixels_change_nothing_and_get_no_gradient(masked):
    prediction, target, mask = masked
    prediction.requires_grad_()
    loss = masked_mse(prediction, target, mask)
    loss.backward()
    outside = (mask == 0).expand_as(prediction)
    assert (prediction.grad[outside] == 0).all()
    assert (prediction.grad[~outside] != 0).all()
    changed = torch.where(outside, 1e3 * normal(3, 4, 6, 5, seed=3), prediction.detach())
    assert torch.equal(masked_mse(changed, target, mask), loss.detach())


def test_an_image_without_valid_pixels_counts_as_zero(masked):
    prediction, target, mask = masked
    mask[1:] = 0
    alone = masked_mse(prediction[:1], target[:1], mask[:1])
    torch.testing.assert_close(masked_mse(prediction, target, mask), alone / 3)


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # 300 squared is beyond float16, and a sum of 4 * 64 * 64 equal numbers is beyond bfloat16's eight digits.
    large, zero = torch.full((1, 4, 64, 64), 300.0, dtype=dtype), torch.zeros(1, 4, 64, 64, dtype=dtype)
    mask = torch.ones(1, 1, 64, 64, dtype=dtype)
    for loss in (latent_mse(large, zero)[0], masked_mse(large, zero, mask)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(90000)
    student, teacher = normal(2, 4, 768, seed=1).to(dtype), normal(2, 4, 768, seed=2).to(dtype)
    assert torch.equal(identity_loss(student, teacher), identity_loss(student.float(), teacher.float()))
