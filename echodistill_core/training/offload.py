"""Keeps the frozen weights of idle networks in host memory, for devices with little memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ModelOffloader:
    """Keeps the frozen weights of `networks` on the host; a network's weights are on the device while it computes.

    Trained parameters stay on the device. A forward pre-hook loads a network; it is offloaded when another one of the
    networks computes, or by `offload`.
    Finish one network's backward before calling another: offloading empties parameters its graph may use. With
    activation checkpointing, backward runs the network's forward again, which loads it.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._host_weights = {network: _on_host(network) for network in networks}
        self._loaded: nn.Module | None = None
        for network, weights in self._host_weights.items():
            _empty(network, weights)
        self._hooks = [network.register_forward_pre_hook(self._load) for network in networks]

    def remove(self) -> None:
        """Remove the hooks and release the host memory.

        Weights are not loaded back onto the device, which may have just run out of memory. `Family.restore` puts the
        loaded tensors back.
        """
        for hook in self._hooks:
            hook.remove()
        self._host_weights.clear()
        # torch caches page-locked memory for later requests; free it. Available from torch 2.9 on.
        release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
        if self.device.type == "cuda" and release is not None:
            release()

    def offload(self) -> None:
        """Free the device memory of the loaded network."""
        if self._loaded is not None:
            _empty(self._loaded, self._host_weights[self._loaded])
        self._loaded = None

    def _load(self, network: nn.Module, _: object) -> None:
        if network is self._loaded:
            return
        self.offload()
        for name, tensor in self._host_weights[network].items():
            # Always a copy, even on the CPU: offloading must not free the host's tensor.
            on_device = tensor.to(self.device, non_blocking=self.device.type == "cuda", copy=True)
            network.get_parameter(name).data = on_device
        self._loaded = network


def _on_host(network: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> frozen weight in host memory; page-locked if CUDA is available, which makes copies faster."""
    frozen = {n: p.detach().cpu() for n, p in network.named_parameters() if not p.requires_grad}
    return {n: t.pin_memory() for n, t in frozen.items()} if torch.cuda.is_available() else frozen


def _empty(network: nn.Module, weights: dict[str, Tensor]) -> None:
    for name in weights:
        parameter = network.get_parameter(name)
        parameter.data = parameter.data.new_empty(0)
