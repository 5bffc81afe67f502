from typing import Any, ClassVar

import torch

from .latent_formats import LatentFormat
from .model_base import ModelType

class ClipTarget:
    def __init__(self, tokenizer: type, clip: type) -> None: ...

class BASE:
    unet_config: ClassVar[dict[str, Any]]
    unet_extra_config: ClassVar[dict[str, Any]]
    latent_format: type[LatentFormat]
    memory_usage_factor: float
    supported_inference_dtypes: list[torch.dtype]
    def __init__(self, unet_config: dict[str, Any]) -> None: ...
    def model_type(self, state_dict: Any, prefix: str = ...) -> ModelType: ...
    def inpaint_model(self) -> bool: ...
    def get_model(self, state_dict: Any, prefix: str = ..., device: torch.device | None = ...) -> Any: ...
    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None: ...
