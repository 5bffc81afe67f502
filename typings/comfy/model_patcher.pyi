from typing import Any

import torch

class ModelPatcher:
    model: Any
    cached_patcher_init: tuple[Any, ...]  # 0.33.0 reads it
    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None: ...
