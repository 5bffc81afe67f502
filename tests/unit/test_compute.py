"""Cuts, micro-batches and recomputation give the gradients that plain autograd gives of the whole graph."""

import pytest
import torch
from torch import nn

from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.training.compute import CheckpointedSequential, Compute, Cut


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flush_sends_the_sum_of_the_collected_gradients_upstream():
    w, a, b = normal(3).requires_grad_(), normal(3, seed=1), normal(3, seed=2)
    ((a * w.sin()).sum() + (b * w.sin()).pow(2).sum()).backward()
    expected, w.grad = w.grad, None
    x = Cut(w.sin())
    x.backward((a * x.leaf).sum())
    assert w.grad is None
    x.backward((b * x.leaf).pow(2).sum())
    x.flush([w])
    torch.testing.assert_close(w.grad, expected)


def test_cuts_nest_and_a_second_flush_adds_nothing():
    w = normal(4).requires_grad_()
    w.exp().sin().square().sum().backward()
    expected, w.grad = w.grad, None
    x = Cut(w.exp())
    y = Cut(x.leaf.sin())
    y.backward(y.leaf.square().sum())
    y.flush([x.leaf])
    x.flush([w])
    x.flush([w])
    torch.testing.assert_close(w.grad, expected)


def test_gradients_reach_the_given_inputs_alone():
    w, other = normal(2).requires_grad_(), normal(2, seed=1).requires_grad_()
    x = Cut(w * other)
    x.backward((x.leaf * other).sum())
    x.flush([w])
    torch.testing.assert_close(w.grad, other.detach().square())
    assert other.grad is None


def test_a_tensor_without_a_graph_collects_nothing():
    head = nn.Linear(2, 1).double()
    x = Cut(normal(3, 2))
    x.backward(head(x.leaf).sum())
    x.flush([*head.parameters()])
    assert x.leaf.grad is None
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize(("size", "count"), [(None, 5), (1, 5), (2, 5), (5, 5), (7, 5)])
def test_microbatches_cover_a_batch_in_order_and_their_weights_sum_to_1(size, count):
    parts = list(Compute(microbatch_size=size).microbatches(count))
    indices = [i for part, _ in parts for i in range(count)[part]]
    assert indices == list(range(count))
    assert all(len(range(count)[part]) == round(weight * count) <= (size or count) for part, weight in parts)
    assert sum(weight for _, weight in parts) == pytest.approx(1)


@pytest.mark.parametrize("recompute", [False, True])
def test_generate_by_microbatches_is_the_function_of_the_whole_batch(recompute):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, scale, calls = normal(5, 3), normal(5, 1, seed=1), []

    def function(x, scale):
        calls.append(len(x))
        return net(x) * scale

    (net(x) * scale).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    out = Compute(microbatch_size=2, recompute=recompute).generate(function, x, scale)
    torch.testing.assert_close(out, net(x) * scale)
    out.square().sum().backward()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    assert sorted(calls) == sorted([2, 2, 1] * (2 if recompute else 1))


def test_map_joins_text_conditioning_and_slices_tuples():
    features = {"a": 1.0, "b": 2.0, "c": 3.0}

    def condition(words):
        x = torch.tensor([features[w] for w in words])
        return TextConditioning(x[:, None, None], pooled=-x[:, None], extra_ids=x[:, None] * 10)

    found = Compute(microbatch_size=2).map(condition, ("a", "b", "c"))
    assert found.features.flatten().tolist() == [1, 2, 3]
    assert found.pooled.flatten().tolist() == [-1, -2, -3]
    assert found.extra_ids.flatten().tolist() == [10, 20, 30]
    assert found[1:].added_conditions.keys() == {"text_embeds", "time_ids"}
    assert TextConditioning(found.features).added_conditions is None


def test_checkpointed_sequential_keeps_one_layers_activations_and_gives_the_same_gradient():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)).double()
    x = normal(2, 6).requires_grad_()

    def saved_numbers(function):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = function(x)
        return out, sum(kept)

    plain, many = saved_numbers(nn.Sequential(*layers))
    plain.square().sum().backward()
    expected, x.grad = x.grad, None
    out, few = saved_numbers(CheckpointedSequential(list(layers)))
    assert torch.equal(out, plain)
    assert few == len(layers) * x.numel()  # each layer's input
    assert many > 2 * few
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
