"""How networks are run and differentiated one after another. memory_mode changes this file's behaviour, no equation."""

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
    """A tensor cut off from its graph: losses are differentiated to `leaf`, and `flush` goes on from there.

    By the chain rule dL/dw = dx/dw^T sum_k dL_k/dx: each L_k runs backward to x as soon as it is computed, so that the
    activations of its network are freed before the next network runs, and x's own network runs backward once.

    leaf: the tensor's values without its graph. It collects gradients where the tensor has a graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.leaf = tensor.detach().requires_grad_(tensor.requires_grad)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to `leaf`; nothing where the tensor has no graph."""
        if self.leaf.requires_grad:
            loss.backward(inputs=[self.leaf])

    def flush(self, inputs: Sequence[Tensor]) -> None:
        """Send the sum of the collected gradients upstream to `inputs`; nothing where none was collected."""
        gradient, self.leaf.grad = self.leaf.grad, None
        if gradient is not None:
            self._tensor.backward(gradient, inputs=inputs)


def cut(tensor: Tensor) -> Cut:
    """Cut a tensor off from its graph: see Cut."""
    return Cut(tensor)


@dataclass
class Compute:
    """How a run's networks are run.

    microbatch_size: images that a network computes at once; None for the whole batch.
    recompute: keep no activations where `generate` and `decode` run a network, and compute them again for the gradient.
    offloader: keeps idle UNets on the host; None where all fit or host and device are one.
    """

    microbatch_size: int | None = None
    recompute: bool = False
    offloader: ModelOffloader | None = None

    def microbatches(self, count: int) -> Iterator[tuple[slice, float]]:
        """The micro-batches of a batch of `count` images, each with its weight, its share of the batch."""
        size = self.microbatch_size or count
        for start in range(0, count, size):
            microbatch = slice(start, min(start + size, count))
            yield microbatch, (microbatch.stop - microbatch.start) / count

    def map(self, function: Callable[..., T], *batched: Any) -> T:
        """function(*batched) of the whole batch, computed by micro-batches.

        batched: sequences of one length B, such as tensors (B, ...), TextConditioning or tuples. function: returns a
        tensor (B, ...) or a TextConditioning.
        """
        parts: list[Any] = [function(*(x[m] for x in batched)) for m, _ in self.microbatches(len(batched[0]))]
        if len(parts) == 1:
            return parts[0]
        joined: Any = TextConditioning.cat(parts) if isinstance(parts[0], TextConditioning) else torch.cat(parts)
        return joined

    def generate(self, function: Callable[..., Tensor], *batched: Any) -> Tensor:
        """As `map`; with `recompute` the activations are computed again in the backward pass."""
        return self.map(_checkpointed(function) if self.recompute else function, *batched)

    def decode(self, family: Family, z: Tensor) -> Tensor:
        """Family.decode of latents (B, 4, h, w); with `recompute` one decoder layer's activations exist at a time."""
        return CheckpointedSequential(family.decoding())(z) if self.recompute else family.decode(z)


class CheckpointedSequential:
    """A chain of functions, each under activation checkpointing (Chen et al. 2016): only their inputs are kept.

    torch.utils.checkpoint.checkpoint_sequential keeps the activations of the last segment, which is the widest here.
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._functions = functions

    def __call__(self, x: Tensor) -> Tensor:
        """The last function's value."""
        for function in self._functions:
            x = _checkpointed(function)(x)
        return x


def _checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        # No network here draws random numbers. A CPU's or a GPU's generator is not read.
        made: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return made

    return run
