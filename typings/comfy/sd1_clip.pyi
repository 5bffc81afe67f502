from typing import Any

import torch

class SDClipModel(torch.nn.Module):
    def __init__(
        self,
        *,
        device: Any = ...,
        layer: str = ...,
        textmodel_json_config: dict[str, Any] | None = ...,
        dtype: torch.dtype | None = ...,
        special_tokens: dict[str, int] = ...,
        layer_norm_hidden_state: bool = ...,
        return_projected_pooled: bool = ...,
        model_options: dict[str, Any] = ...,
    ) -> None: ...

class SDTokenizer:
    def __init__(
        self,
        *,
        pad_with_end: bool = ...,
        embedding_directory: list[str] | None = ...,
        embedding_size: int = ...,
        embedding_key: str = ...,
        tokenizer_data: dict[str, Any] = ...,
    ) -> None: ...

class SD1Tokenizer:
    def __init__(
        self,
        *,
        embedding_directory: list[str] | None = ...,
        tokenizer_data: dict[str, Any] = ...,
        clip_name: str = ...,
        tokenizer: type[SDTokenizer] = ...,
    ) -> None: ...

class SD1ClipModel(torch.nn.Module):
    def __init__(
        self,
        *,
        device: Any = ...,
        dtype: torch.dtype | None = ...,
        model_options: dict[str, Any] = ...,
        clip_name: str = ...,
        clip_model: type[SDClipModel] = ...,
    ) -> None: ...
