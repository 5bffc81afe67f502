from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .supported_models_base import ClipTarget

class CLIP:
    def __init__(
        self,
        target: ClipTarget | None = ...,
        embedding_directory: list[str] | None = ...,
        *,
        parameters: int = ...,
        model_options: dict[str, Any] = ...,
    ) -> None: ...
    def load_sd(self, sd: Mapping[str, Tensor]) -> tuple[list[str], list[str]]: ...

class VAE:
    latent_channels: int
    def __init__(
        self,
        sd: dict[str, Tensor] | None = ...,
        *,
        config: dict[str, Any] | None = ...,
        dtype: torch.dtype | None = ...,
    ) -> None: ...
