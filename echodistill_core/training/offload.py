"""What memory_mode low does: one UNet at a time on the device, and one layer's activations at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Layers:
    """A chain of functions that keeps what each was given, and computes each again for its gradient."""

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._functions = functions
        self._given: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The chain's value, without a graph."""
        self._given = []
        for function in self._functions:
            self._given.append(x)
            x = function(x)
        return x

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient at what `forward` was given last, from that at its value."""
        for function in reversed(self._functions):
            gradient = _pulled_back(function, self._given.pop(), gradient)
        return gradient


class ModelOffloader:
    """Keeps the frozen weights of these networks on the host, and those of the one that computed last on the device.

    What learns stays on the device. A graph through a network must be gone, or have had its backward pass, before
    another network computes: it may hold the very parameters that are emptied then.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._homes = {network: _home(network) for network in networks}
        self._resident: nn.Module | None = None
        for network, home in self._homes.items():
            _leave(network, home)
        self._hooks = [network.register_forward_pre_hook(self._enter) for network in networks]

    def end(self) -> None:
        """Watch the networks no more. Their weights stay where they are: Family.restore has its own, and on a device
        that just ran out of memory there may be no room for them.
        """
        for hook in self._hooks:
            hook.remove()
        self._homes.clear()
        # Page-locked memory is kept for the next one who asks, which in a server may be nobody. From torch 2.9 on.
        release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
        if self.device.type == "cuda" and release is not None:
            release()

    def leave(self) -> None:
        """Make room for what is no UNet: the one on the device leaves it."""
        if self._resident is not None:
            _leave(self._resident, self._homes[self._resident])
        self._resident = None

    def _enter(self, network: nn.Module, _: object) -> None:
        if network is not self._resident:
            self.leave()
            self._bring(network)
            self._resident = network

    def _bring(self, network: nn.Module) -> None:
        for name, tensor in self._homes[network].items():
            # A copy, even where the host is the device: what is dropped later must not be the home itself.
            there = tensor.to(self.device, non_blocking=self.device.type == "cuda", copy=True)
            network.get_parameter(name).data = there


@torch.enable_grad()
def _pulled_back(function: Callable[[Tensor], Tensor], given: Tensor, gradient: Tensor) -> Tensor:
    x = given.detach().requires_grad_()
    function(x).backward(gradient, inputs=[x])
    assert x.grad is not None
    return x.grad


def _home(network: nn.Module) -> dict[str, Tensor]:
    """The frozen weights on the host; page-locked where there is a GPU, so that they travel at the bus's speed."""
    frozen = {n: p.detach().cpu() for n, p in network.named_parameters() if not p.requires_grad}
    return {n: t.pin_memory() for n, t in frozen.items()} if torch.cuda.is_available() else frozen


def _leave(network: nn.Module, home: dict[str, Tensor]) -> None:
    for name in home:
        parameter = network.get_parameter(name)
        parameter.data = parameter.data.new_empty(0)
