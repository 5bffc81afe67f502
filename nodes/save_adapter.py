"""SaveEchoAdapter saves adapter files; EchoAdapterInfo shows the content of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..echodistill_core.adapter.file import read_adapter
from ..echodistill_core.cli.facts import adapter_facts, lines
from ..echodistill_core.errors import InputError
from ..echodistill_core.files import replacing
from ..echodistill_core.messages import quoted
from .bridge.adapters import ROLES, UNLINKED, adapter_file, adapter_inputs, check_name, file_state
from .bridge.node_text import set_status, shown_on_node
from .bridge.paths import NONE
from .bridge.sockets import AdapterFiles, AdapterSocket
from .bridge.widgets import schema

LONGEST_NAME = 200  # bytes of a file name, without the counter, the role and the extension
LORAS = "loras"  # sub-folder of the output folder; ComfyUI lists it among its loras folders


class SaveEchoAdapter(io.ComfyNode):
    """Copies adapters from training to output/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="SaveEchoAdapter",
            display_name="Save Echo Adapter",
            search_aliases=("save lora", "export", "lora", "dreambooth", "personalize"),
            description=(
                "Saves an adapter to output/loras, where Load Echo Adapter and stock Load LoRA list it (press R)."
            ),
            inputs=[
                AdapterSocket.Input("from_training", display_name="adapter", tooltip="From training."),
                io.String.Input(
                    "filename_prefix",
                    default="echo",
                    tooltip="Start of the file name; a counter is appended, so no file is overwritten.",
                ),
                io.Combo.Input("role", options=[*ROLES, "both"], default="student", tooltip="Which adapter to save."),
            ],
            outputs=[io.String.Output(display_name="names", tooltip="File names, as Load Echo Adapter lists them.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(cls, from_training: AdapterFiles, filename_prefix: str, role: str) -> io.NodeOutput:
        """Save the adapters and return their listed names."""
        _check_prefix(filename_prefix)
        roles = ROLES if role == "both" else [role]
        sources = {role: adapter_file(from_training, role) for role in roles}
        folder, name, counter, *_ = folder_paths.get_save_image_path(
            f"{LORAS}/{filename_prefix}", folder_paths.get_output_directory()
        )
        names = []
        for role, source in sources.items():
            target = Path(folder) / f"{name}_{counter:05}_{role}.safetensors"
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
            # As ComfyUI lists it, with the operating system's separators.
            names.append(str(target.relative_to(Path(folder_paths.get_output_directory()) / LORAS)))
        text = "\n".join(names)
        set_status(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _check_prefix(prefix: str) -> None:
    """Raise InputError for an invalid file name or one outside output/loras, before a folder is created for it."""
    if not prefix.strip():
        raise InputError("filename_prefix is empty; write a name for the file, for instance dog.")
    root = (Path(folder_paths.get_output_directory()) / LORAS).resolve()
    try:
        target = (root / prefix).resolve()
        leads_out = target == root or not target.is_relative_to(root) or prefix.endswith(("/", "\\"))
        os.fsencode(prefix)
    except (OSError, ValueError):  # a NUL byte, half of a surrogate pair, a name longer than the system allows
        leads_out = True
    if leads_out or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(prefix).parts):
        raise InputError(
            f"filename_prefix {quoted(prefix)} leads out of output/{LORAS}, or is no name of a file; choose a name "
            f"without .. and without a slash at either end, of {LONGEST_NAME} letters at most."
        )


class EchoAdapterInfo(io.ComfyNode):
    """Shows the metadata and tensors of an adapter file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="EchoAdapterInfo",
            display_name="Echo Adapter Info",
            search_aliases=("lora info", "metadata", "inspect", "lora"),
            description="Shows an adapter's subject, base model, settings and licences.",
            inputs=adapter_inputs(),
            outputs=[io.String.Output(display_name="text", tooltip="The facts, one per line.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None, from_training: Any = UNLINKED) -> bool | str:
        """Report a listed adapter whose file no longer exists, before any node runs."""
        return check_name(adapter_name, from_training)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_: Any) -> Any:
        """Changes when the file changes, so that it is read again."""
        return file_state(adapter_name)

    @classmethod
    @shown_on_node
    def execute(cls, adapter_name: str, role: str, from_training: AdapterFiles | None = None) -> io.NodeOutput:
        """Return the facts as text; without an adapter, a text that asks the user to choose one."""
        if from_training is None and adapter_name == NONE:
            text = "choose an adapter: connect one from training or from Load Echo Adapter, or choose one in the list"
        else:
            if from_training is not None and len(from_training.paths) == 1:
                (role,) = from_training.paths
            path = adapter_file(from_training, role, adapter_name)
            text = "\n".join([*lines(adapter_facts(read_adapter(path))), f"file  {path.name}"])
        set_status(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
