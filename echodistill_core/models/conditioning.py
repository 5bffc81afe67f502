"""The conditioning inputs of a UNet for a batch of prompts, as one object for all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextConditioning:
    """The conditioning of B prompts.

    features: (B, L, width), the input of cross-attention's keys and values; L is 77 for CLIP.
    pooled: (B, P), one vector per prompt. extra_ids: (B, k), numbers such as image size and crop. Both are added to the
    timestep embedding (SDXL, Podell et al. 2023, Sec. 2.2); None for families without them.
    """

    features: Tensor
    pooled: Tensor | None = None
    extra_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice) -> TextConditioning:
        return self._of(*(None if x is None else x[index] for x in self._tensors))

    def detach(self) -> TextConditioning:
        """The same values without a graph."""
        return self._of(*(None if x is None else x.detach() for x in self._tensors))

    def expand(self, count: int) -> TextConditioning:
        """The conditioning of one prompt, (1, ...), as a view for `count` images."""
        return self._of(*(None if x is None else x.expand(count, *x.shape[1:]) for x in self._tensors))

    @property
    def added_conditions(self) -> dict[str, Tensor] | None:
        """diffusers' `added_cond_kwargs`; None for families without pooled features."""
        if self.pooled is None:
            return None
        ids = {} if self.extra_ids is None else {"time_ids": self.extra_ids}
        return {"text_embeds": self.pooled, **ids}

    @staticmethod
    def cat(parts: Sequence[TextConditioning]) -> TextConditioning:
        """Concatenate the conditioning of several batches of prompts, of one family, in order."""
        columns = zip(*(part._tensors for part in parts), strict=True)
        return TextConditioning._of(*(None if column[0] is None else torch.cat(column) for column in columns))

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.features, self.pooled, self.extra_ids

    @staticmethod
    def _of(features: Tensor | None, pooled: Tensor | None, extra_ids: Tensor | None) -> TextConditioning:
        assert features is not None
        return TextConditioning(features, pooled, extra_ids)
