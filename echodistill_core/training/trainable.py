"""Which of a UNet's weights learn: cross-attention keys and values, all of them, or low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def trained_names(unet: nn.Module, trainable: str) -> list[str]:
    """Names of the parameters that `trainable` (settings.TRAINABLE) lets learn, sorted.

    Not in the UNet's own order, by which a checkpoint's moments would be told apart: taking low-rank updates out again
    leaves a layer's weight behind its bias.
    """
    kind = trainable.removesuffix("+token")
    names = sorted(n for n, _ in unet.named_parameters())
    if kind == "token":
        return []
    if kind == "kv":
        return [n for n in names if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    if kind == "lora":
        ends = tuple(f".{a}.{t}.weight" for a in ("attn1", "attn2") for t in LORA_TARGETS)
        return [n for n in names if n.endswith(ends)]
    assert kind == "full", trainable
    return names


class LowRank(nn.Module):
    """W + up @ down (LoRA, Hu et al. 2021, with alpha = rank): up starts at 0, so training starts at W."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        down = torch.randn(rank, in_features, generator=generator) / rank
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight."""
        return weight + (self.up @ self.down).to(weight.dtype)


class TrainedWeights:
    """The parameters of one UNet that learn, as float32 whatever precision the rest computes in.

    parameters: name -> parameter, in a fixed order; these are what an optimiser steps and a checkpoint holds.
    working: what the UNet computes with and a loss is differentiated with respect to: the same, or copies of them in
    the UNet's precision. `install` puts them into the UNet; Family.restore takes them out again.
    """

    def __init__(self, unet: UNet2DConditionModel, trainable: str, rank: int, generator: torch.Generator) -> None:
        self.unet = unet
        self.is_low_rank = trainable.startswith("lora")
        names = trained_names(unet, trainable)
        # Held in the precision they came in: the frozen part may be cast down after this.
        self.base = {n: unet.get_parameter(n).detach().clone() for n in names}
        self.parameters: dict[str, nn.Parameter] = {}
        self.working: dict[str, nn.Parameter] = {}
        self._low_rank: dict[str, LowRank] = {}
        for name, weight in self.base.items():
            if self.is_low_rank:
                self._low_rank[name] = update = LowRank(weight, rank, generator)
                self.parameters[f"{name}.up"], self.parameters[f"{name}.down"] = update.up, update.down
            else:
                self.parameters[name] = nn.Parameter(weight.float().clone())

    def load_initial(self, deltas: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start from what was learned before: differences to the base, or a low-rank update's own (up, down).

        What `deltas` and `factors` say afterwards counts from the base, as if this were one and the same training.
        """
        with torch.no_grad():
            for name, delta in deltas.items():
                self.parameters[name].add_(delta.to(self.parameters[name]))
            for name, (up, down) in factors.items():
                self._low_rank[name].up.copy_(up)
                self._low_rank[name].down.copy_(down)

    def install(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the UNet compute with the trained parameters. Call after the UNet was moved and cast to these."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        if self.is_low_rank or dtype == torch.float32:
            self.working = self.parameters
        else:
            self.working = {n: nn.Parameter(p.detach().to(dtype)) for n, p in self.parameters.items()}
        for name in self.base:
            module, leaf = _owner(self.unet, name)
            if self.is_low_rank:
                parametrize.register_parametrization(module, leaf, self._low_rank[name])
            else:
                setattr(module, leaf, self.working[name])

    def grads_to_master(self) -> None:
        """Hand the working copies' gradients to the parameters, in float32."""
        if self.working is self.parameters:
            return
        for name, parameter in self.parameters.items():
            gradient, self.working[name].grad = self.working[name].grad, None
            parameter.grad = None if gradient is None else gradient.float()

    @torch.no_grad()
    def sync_from_master(self) -> None:
        """Bring the working copies to where the parameters are; to be called whenever those have changed."""
        if self.working is not self.parameters:
            for name, parameter in self.parameters.items():
                self.working[name].copy_(parameter)

    def deltas(self) -> dict[str, Tensor]:
        """What was learned: effective weight minus the weight it started from, float32 on the CPU."""
        if self.is_low_rank:
            return {n: (u.up @ u.down).detach().float().cpu() for n, u in self._low_rank.items()}
        return {n: (p.detach() - self.base[n].to(p)).cpu() for n, p in self.parameters.items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(up, down) of every low-rank update, float32 on the CPU; empty for the other kinds."""
        return {n: (u.up.detach().cpu(), u.down.detach().cpu()) for n, u in self._low_rank.items()}


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf
