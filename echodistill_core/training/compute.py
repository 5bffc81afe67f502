"""How networks run and are differentiated: micro-batches, activation checkpointing, offloading, cut graphs.

memory_mode changes which of these are used, never an equation of training.steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.conditioning import TextConditioning
from ..models.family import Family
from .offload import ModelOffloader

T = TypeVar("T")


class Cut:
    """Splits the backward pass at a tensor x: losses run backward to `leaf`, then `flush` continues through x's graph.

    For L = sum_k L_k(x) with x = x(w), the chain rule gives dL/dw = (dx/dw)^T sum_k dL_k/dx. Each L_k runs backward to
    x as soon as it is computed, which frees the activations of its network before the next network runs. x's own
    network runs backward once, from the sum.

    leaf: x detached, of the same shape; it accumulates gradients if x requires one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.leaf = tensor.detach().requires_grad_(tensor.requires_grad)

    def backward(self, loss: Tensor) -> None:
        """Add dL/dx of a scalar loss L to the gradient of `leaf`. Does nothing if x requires no gradient."""
        if self.leaf.requires_grad:
            loss.backward(inputs=[self.leaf])

    def flush(self, inputs: Sequence[Tensor]) -> None:
        """Run x's graph backward from the accumulated gradient, to the gradients of `inputs`, and reset it.

        Does nothing if no gradient was accumulated.
        """
        gradient, self.leaf.grad = self.leaf.grad, None
        if gradient is not None:
            self._tensor.backward(gradient, inputs=inputs)


@dataclass
class Compute:
    """How a run's networks are computed.

    microbatch_size: images per forward pass, 1 or more; None for the whole batch.
    recompute: use activation checkpointing in `generate` and `decode`.
    offloader: keeps idle UNets in host memory; None if all networks stay on the device.
    """

    microbatch_size: int | None = None
    recompute: bool = False
    offloader: ModelOffloader | None = None

    def microbatches(self, count: int) -> Iterator[tuple[slice, float]]:
        """Slices that cover a batch of `count` images in order, each with its share of the batch, in (0, 1]."""
        size = self.microbatch_size or count
        for start in range(0, count, size):
            microbatch = slice(start, min(start + size, count))
            yield microbatch, (microbatch.stop - microbatch.start) / count

    def map(self, function: Callable[..., T], *batched: Any) -> T:
        """function(*batched) of a batch, computed by micro-batches and concatenated.

        batched: sequences of equal length B: tensors (B, ...), TextConditioning or tuples.
        function: returns a tensor (b, ...) or a TextConditioning for slices of length b.
        """
        parts: list[Any] = [function(*(x[m] for x in batched)) for m, _ in self.microbatches(len(batched[0]))]
        if len(parts) == 1:
            return parts[0]
        joined: Any = TextConditioning.cat(parts) if isinstance(parts[0], TextConditioning) else torch.cat(parts)
        return joined

    def generate(self, function: Callable[..., Tensor], *batched: Any) -> Tensor:
        """`map`, under activation checkpointing if `recompute` is on."""
        return self.map(_checkpointed(function) if self.recompute else function, *batched)

    def decode(self, family: Family, z: Tensor) -> Tensor:
        """Family.decode of latents z (B, 4, h, w): images (B, 3, 8h, 8w), nominally in [-1, 1].

        With `recompute`, the activations of one decoder layer exist at a time. The UNets are offloaded before.
        """
        if self.offloader is not None:
            self.offloader.offload()
        return CheckpointedSequential(family.decoding())(z) if self.recompute else family.decode(z)


class CheckpointedSequential:
    """A chain of functions, each under activation checkpointing (Chen et al. 2016): only their inputs are stored.

    torch.utils.checkpoint.checkpoint_sequential does not checkpoint its last segment, which is the VAE decoder's
    largest.
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._functions = functions

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the functions to x one after another. Returns the value of the last one."""
        for function in self._functions:
            x = _checkpointed(function)(x)
        return x


def _checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        # The networks are deterministic, so the state of the random generators need not be saved and restored.
        output: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return output

    return run
