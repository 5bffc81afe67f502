"""memory_mode low: layers under activation checkpointing, and networks of which one at a time is on the device."""

import pytest
import torch
from torch import nn

from echodistill_core.training import build
from echodistill_core.training.compute import CheckpointedSequential
from echodistill_core.training.offload import ModelOffloader
from echodistill_core.training.samples import sample_images


def test_layers_give_value_and_gradient_of_their_chain():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), torch.tanh, nn.Linear(5, 4), lambda x: x.square().sum(-1)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        if isinstance(layer, nn.Module):
            layer.double().requires_grad_(False)
    value = x
    for layer in layers:
        value = layer(value)
    upstream = torch.randn_like(value)
    (expected,) = torch.autograd.grad(value, x, upstream)
    chain = CheckpointedSequential(layers)
    for _ in range(2):  # again, as the next iteration does
        found = chain(x)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(torch.autograd.grad(found, x, upstream)[0], expected)
    with torch.no_grad():
        assert not chain(x).requires_grad


@pytest.mark.parametrize("size", [64, 48])
def test_the_decoders_layers_are_decode(tiny_family, size):
    family = tiny_family()
    z = torch.randn(2, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    image = family.decode(z)
    assert len(family.decoding()) > 6
    found = CheckpointedSequential(family.decoding())(z)
    torch.testing.assert_close(found, image)
    upstream = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    gradient, expected = (torch.autograd.grad(x, z, upstream)[0] for x in (found, image))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_one_network_is_loaded_at_a_time_and_trained_parameters_stay():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    for network in networks:
        network[0].requires_grad_(False)
    x = torch.randn(3, 4)
    expected = [network(x) for network in networks]
    trained = [network[1].weight for network in networks]
    offloader = ModelOffloader(networks, torch.device("cpu"))

    def sizes():
        return [network[0].weight.numel() for network in networks]

    assert sizes() == [0, 0]
    for i in (0, 1, 1, 0):
        out = networks[i](x)
        assert torch.equal(out, expected[i])
        assert sizes() == [16 * (i == 0), 16 * (i == 1)]
    out.sum().backward()
    assert networks[0][1].weight.grad is not None
    offloader.offload()
    assert sizes() == [0, 0]
    assert all(network[1].weight is weight for network, weight in zip(networks, trained, strict=True))
    offloader.remove()
    with pytest.raises(RuntimeError):
        networks[0](x)  # no hook loads the weights any more


def test_samples_of_one_network_do_not_move_it_between_images(tiny_state, monkeypatch):
    """A pool or a preview decodes each image; the student's weights stay on the device meanwhile."""
    monkeypatch.setattr(build, "ONE_MEMORY", ())
    state, loads = tiny_state(memory_mode="low"), []
    load = ModelOffloader._load

    def counted(self, network, *rest):
        if network is not self._loaded:
            loads.append(network)
        return load(self, network, *rest)

    for hook in state.compute.offloader._hooks:
        hook.remove()
    offloader = state.compute.offloader
    for unet in (state.family.student.unet, state.family.teacher.unet):
        unet.register_forward_pre_hook(lambda network, given: counted(offloader, network, given))
    sample_images(state, "student", ["a dog"] * 4, 0, 64, 1)
    assert loads == [state.family.student.unet]
