"""The critic's head and both sides of its game against arithmetic by hand and torch's own nn.Linear."""

import math

import pytest
import torch
from random_tensors import rng
from torch import nn

from echodistill_core.losses.objectives import FAKE, REAL, CriticHead, critic_loss, generator_loss


def minus_log_softmax(logits, label):
    """Mean of -log(exp(l_label) / sum exp(l)) with plain Python numbers."""
    rows = logits.tolist()
    return sum(-math.log(math.exp(row[label]) / sum(math.exp(x) for x in row)) for row in rows) / len(rows)


# --- Losses ---------------------------------------------------------------------------------------


def test_generator_loss_is_minus_log_probability_of_real():
    fake = 3 * torch.randn(5, 2, generator=rng())
    assert generator_loss(fake).item() == pytest.approx(minus_log_softmax(fake, 1), rel=1e-5)


@pytest.mark.parametrize("fakes", [4, 7])
def test_critic_loss_weighs_both_kinds_by_half(fakes):
    real, fake = 3 * torch.randn(4, 2, generator=rng(1)), 3 * torch.randn(fakes, 2, generator=rng(2))
    expected = 0.5 * (minus_log_softmax(real, 1) + minus_log_softmax(fake, 0))
    assert critic_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_critic_loss_of_equal_batches_is_one_mean_over_both():
    real, fake = torch.randn(4, 2, generator=rng(1)), torch.randn(4, 2, generator=rng(2))
    labels = torch.tensor([1] * 4 + [0] * 4)
    torch.testing.assert_close(critic_loss(real, fake), nn.functional.cross_entropy(torch.cat([real, fake]), labels))


def test_a_critic_that_knows_nothing_is_at_ln_2():
    zeros = torch.zeros(3, 2)
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))
    assert critic_loss(zeros, zeros).item() == pytest.approx(math.log(2))


def test_descent_moves_logits_the_right_way():
    real, fake = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    critic_loss(real, fake).backward()
    # The gradient of cross-entropy is softmax minus one-hot; batch 2 and one half make a quarter of it.
    assert real.grad[:, REAL].tolist() == pytest.approx([-0.125] * 2)
    assert real.grad[:, FAKE].tolist() == pytest.approx([0.125] * 2)
    assert fake.grad[:, REAL].tolist() == pytest.approx([0.125] * 2)
    assert fake.grad[:, FAKE].tolist() == pytest.approx([-0.125] * 2)
    fake.grad = None
    generator_loss(fake).backward()
    assert fake.grad[:, REAL].tolist() == pytest.approx([-0.25] * 2)
    assert fake.grad[:, FAKE].tolist() == pytest.approx([0.25] * 2)


def test_generator_gradient_does_not_vanish_where_the_critic_is_sure_of_the_fake():
    sure = torch.tensor([[30.0, -30.0]], requires_grad=True)
    loss = generator_loss(sure)
    loss.backward()
    assert loss.item() == pytest.approx(60)
    assert sure.grad[0, REAL].item() == pytest.approx(-1)


def test_half_precision_logits_are_compared_in_float32():
    logits = torch.randn(8, 2, generator=rng()).bfloat16()
    assert generator_loss(logits).dtype == critic_loss(logits, logits).dtype == torch.float32
    assert generator_loss(logits).item() == pytest.approx(minus_log_softmax(logits, 1), rel=1e-5)


# --- Head -----------------------------------------------------------------------------------------


def test_head_is_the_two_layer_map():
    head, x = CriticHead(24, rng()), torch.randn(3, 24, generator=rng(1))
    weights = {name: p.detach().double() for name, p in head.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    assert shapes == {"hidden.weight": (512, 24), "hidden.bias": (512,), "output.weight": (2, 512), "output.bias": (2,)}
    inner = (x.double() @ weights["hidden.weight"].T + weights["hidden.bias"]).clamp(min=0)
    expected = inner @ weights["output.weight"].T + weights["output.bias"]
    torch.testing.assert_close(head(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_are_those_nn_linear_draws_from_the_same_seed():
    head = CriticHead(384, rng(42))
    with torch.random.fork_rng():
        torch.manual_seed(42)
        reference = [nn.Linear(384, 512), nn.Linear(512, 2)]
    for ours, theirs in zip((head.hidden, head.output), reference, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=1e-8)


def test_initial_weights_fill_their_range_evenly():
    bound = 384**-0.5
    weight = CriticHead(384, rng()).hidden.weight.detach().double()
    assert 0.999 * bound < weight.abs().max().item() <= bound
    assert weight.mean().item() == pytest.approx(0, abs=5 * bound / (3 * weight.numel()) ** 0.5)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_head_depends_on_its_generator_and_on_nothing_global():
    torch.manual_seed(0)
    before, generator = torch.get_rng_state(), rng(1)
    first, second = CriticHead(16, generator), CriticHead(16, generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    again = CriticHead(16, rng(1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, second.state_dict()[name])


def test_head_learns_to_tell_two_kinds_apart():
    real, fake = torch.randn(32, 8, generator=rng(1)) + 1, torch.randn(32, 8, generator=rng(2)) - 1
    head = CriticHead(8, rng(3))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        critic_loss(head(real), head(fake)).backward()
        optimizer.step()
    assert (head(real).argmax(1) == REAL).float().mean().item() > 0.95
    assert (head(fake).argmax(1) == FAKE).float().mean().item() > 0.95
