"""The inputs by which a node takes an adapter: a socket from training, or a name from the list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...echodistill_core.errors import InputError
from .paths import NONE, adapter_names, adapter_path
from .sockets import AdapterFiles, AdapterSocket

ROLES = ["student", "teacher"]
UNLINKED = "unlinked"  # ComfyUI passes None for a linked input and nothing for an unlinked one


def adapter_inputs() -> list[io.Input]:
    """The socket, the list of names, and the role."""
    return [
        AdapterSocket.Input(
            "from_training",
            display_name="adapter",
            optional=True,
            tooltip="From training; used instead of the list.",
        ),
        io.Combo.Input(
            "adapter_name",
            options=[NONE, *adapter_names()],
            default=NONE,
            tooltip="An adapter in ComfyUI's loras folders; Save Echo Adapter saves to output/loras.",
        ),
        io.Combo.Input(
            "role",
            options=ROLES,
            default="student",
            tooltip="Which adapter of the socket: student (one step) or teacher (many steps).",
        ),
    ]


def check_name(name: str | None, from_training: Any) -> bool | str:
    """True, or an error message for a name from the list. None: the name comes from another node.

    from_training: UNLINKED if the socket is not linked; the name is checked only then.
    """
    if from_training is not UNLINKED or name in (None, NONE):
        return True
    try:
        adapter_path(str(name))
    except InputError as error:
        return str(error)
    return True


def file_state(name: str) -> Any:
    """A value that changes when the listed file changes: its modification time and size."""
    if name == NONE:
        return NONE
    stat = adapter_path(name).stat()
    return [stat.st_mtime_ns, stat.st_size]


def adapter_file(from_training: AdapterFiles | None, role: str, name: str = NONE) -> Path:
    """The adapter file to read: the socket's for this role, or the listed one. Raises InputError if neither exists."""
    if from_training is None:
        if name == NONE:
            raise InputError("no adapter was chosen; connect one from training, or choose one in the list.")
        return adapter_path(name)
    path = from_training.paths.get(role)
    if path is None:
        raise InputError(f"this training has no adapter of the {role}; it has one of {', '.join(from_training.paths)}.")
    if not path.is_file():
        raise InputError(
            f"the adapter {path} is gone; empty ComfyUI's execution cache (Unload Models and Execution Cache) and run "
            "again: training makes it anew."
        )
    return path
