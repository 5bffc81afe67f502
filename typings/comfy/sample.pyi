from typing import Any

from torch import Tensor

def fix_empty_latent_channels(model: Any, latent_image: Tensor) -> Tensor: ...
def prepare_noise(latent_image: Tensor, seed: int) -> Tensor: ...
def sample_custom(
    model: Any,
    noise: Tensor,
    cfg: float,
    sampler: Any,
    sigmas: Tensor,
    positive: Any,
    negative: Any,
    latent_image: Tensor,
    *,
    disable_pbar: bool = ...,
    seed: int | None = ...,
) -> Tensor: ...
