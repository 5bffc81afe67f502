from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

from . import ui

class Input:
    extra_dict: dict[str, Any]

class Output: ...

class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"

class _HiddenHolder:
    unique_id: str | None

# search_aliases: only in newer versions.
class Schema:
    __dataclass_fields__: ClassVar[dict[str, Any]]
    def __init__(
        self,
        node_id: str,
        display_name: str | None = ...,
        category: str = ...,
        inputs: Sequence[Input] | None = ...,
        outputs: Sequence[Output] | None = ...,
        hidden: Sequence[Hidden] | None = ...,
        description: str = ...,
        *,
        is_output_node: bool = ...,
        search_aliases: list[str] = ...,
    ) -> None: ...

class NodeOutput:
    def __init__(self, *args: Any, ui: ui.PreviewImage | ui.PreviewText | None = ...) -> None: ...

class ComfyNode:
    hidden: _HiddenHolder

class _SocketOutput(Output):
    def __init__(self, id: str | None = ..., display_name: str | None = ..., tooltip: str | None = ...) -> None: ...

class _SocketInput(Input):
    def __init__(
        self, id: str, display_name: str | None = ..., optional: bool = ..., tooltip: str | None = ...
    ) -> None: ...

class _Socket:
    Input: type[_SocketInput]
    Output: type[_SocketOutput]

class Clip(_Socket): ...
class Image(_Socket): ...
class Latent(_Socket): ...
class Model(_Socket): ...
class Vae(_Socket): ...

def Custom(io_type: str) -> type[_Socket]: ...

class Boolean:
    class Input(_SocketInput):
        def __init__(self, id: str, *, default: bool | None = ..., tooltip: str | None = ...) -> None: ...

class Int:
    class Input(_SocketInput):
        def __init__(
            self,
            id: str,
            *,
            default: int | None = ...,
            min: int | None = ...,
            max: int | None = ...,
            step: int | None = ...,
            control_after_generate: bool | None = ...,
            tooltip: str | None = ...,
        ) -> None: ...

class Float:
    class Input(_SocketInput):
        def __init__(
            self,
            id: str,
            *,
            default: float | None = ...,
            min: float | None = ...,
            max: float | None = ...,
            step: float | None = ...,
            round: float | bool | None = ...,
            tooltip: str | None = ...,
        ) -> None: ...

    Output: type[_SocketOutput]

class String:
    class Input(_SocketInput):
        def __init__(
            self,
            id: str,
            *,
            multiline: bool = ...,
            default: str | None = ...,
            dynamic_prompts: bool | None = ...,
            tooltip: str | None = ...,
        ) -> None: ...

    Output: type[_SocketOutput]

class Combo:
    class Input(_SocketInput):
        def __init__(
            self, id: str, options: list[str], *, default: str | None = ..., tooltip: str | None = ...
        ) -> None: ...
