"""The trained parameters of a UNet: cross-attention keys and values, all weights, or low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def trained_names(unet: nn.Module, trainable: str) -> list[str]:
    """Sorted names of the UNet's parameters that `trainable`, one of settings.TRAINABLE, selects.

    A checkpoint identifies AdamW's moments by this order. The UNet's own order would not do: removing low-rank updates
    moves a layer's weight behind its bias.
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
    """A parametrization W + up @ down (LoRA, Hu et al. 2021, with alpha = rank). up (out, rank) starts at 0, down
    (rank, in) at N(0, 1/rank^2).
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        down = torch.randn(rank, in_features, generator=generator) / rank
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight (out, in), in the dtype of `weight`."""
        return weight + (self.up @ self.down).to(weight.dtype)


class TrainedWeights:
    """The trained parameters of one UNet, with float32 master copies (Micikevicius et al. 2018).

    parameters: name -> float32 master, in a fixed order; optimisers update these and checkpoints store them.
    working: name -> the parameter in the UNet, for which backward computes gradients: the master itself, or its copy in
    the UNet's precision.
    base: name -> weight before training, in the precision it was loaded in.
    `install` puts the working parameters into the UNet; `Family.restore` removes them.
    """

    def __init__(self, unet: UNet2DConditionModel, trainable: str, rank: int, generator: torch.Generator) -> None:
        self.unet = unet
        self.is_low_rank = trainable.startswith("lora")
        names = trained_names(unet, trainable)
        # Cloned before the UNet is cast down.
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
        """Set initial values of an earlier training: weight differences to `base`, or (up, down) of low-rank updates.

        The methods `deltas` and `factors` then return the difference of both trainings to `base`.
        """
        with torch.no_grad():
            for name, delta in deltas.items():
                self.parameters[name].add_(delta.to(self.parameters[name]))
            for name, (up, down) in factors.items():
                self._low_rank[name].up.copy_(up)
                self._low_rank[name].down.copy_(down)

    def install(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put the trained parameters into the UNet. Call it after the UNet was moved to this device and dtype."""
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
        """Move the gradients of the working copies to the masters, as float32."""
        if self.working is self.parameters:
            return
        for name, parameter in self.parameters.items():
            gradient, self.working[name].grad = self.working[name].grad, None
            parameter.grad = None if gradient is None else gradient.float()

    @torch.no_grad()
    def sync_from_master(self) -> None:
        """Copy the masters to the working copies. Call it after every change of the masters."""
        if self.working is not self.parameters:
            for name, parameter in self.parameters.items():
                self.working[name].copy_(parameter)

    def deltas(self) -> dict[str, Tensor]:
        """Name -> effective weight minus `base`, float32 on the CPU."""
        if self.is_low_rank:
            return {n: (u.up @ u.down).detach().float().cpu() for n, u in self._low_rank.items()}
        return {n: (p.detach() - self.base[n].to(p)).cpu() for n, p in self.parameters.items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> (up, down) of the low-rank updates, float32 on the CPU; empty without low-rank updates."""
        return {n: (u.up.detach().cpu(), u.down.detach().cpu()) for n, u in self._low_rank.items()}


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf
