"""SaveEchoAdapter and EchoAdapterInfo: adapter files for keeps, and what is in one."""

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
from .bridge.node_text import say, shown_on_node
from .bridge.paths import NONE
from .bridge.sockets import AdapterFiles, AdapterSocket
from .bridge.widgets import schema

LONGEST_NAME = 200  # bytes of a file name; a counter, the role and the ending follow
LORAS = "loras"  # of the output folder, which ComfyUI lists among its loras


class SaveEchoAdapter(io.ComfyNode):
    """Adapters from training into output/loras."""

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
                    tooltip="The file's name; a counter follows, so nothing is overwritten.",
                ),
                io.Combo.Input("role", options=[*ROLES, "both"], default="student", tooltip="Whose adapter to save."),
            ],
            outputs=[io.String.Output(display_name="names", tooltip="The names, as Load Echo Adapter lists them.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @shown_on_node
    def execute(cls, from_training: AdapterFiles, filename_prefix: str, role: str) -> io.NodeOutput:
        """Save and return the names."""
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
            # As ComfyUI lists it, with the system's own separators.
            names.append(str(target.relative_to(Path(folder_paths.get_output_directory()) / LORAS)))
        text = "\n".join(names)
        say(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _check_prefix(prefix: str) -> None:
    """Raise InputError for a name that is none, or that leads out of output/loras, before a folder is made for it."""
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
    """What an adapter file says of itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="EchoAdapterInfo",
            display_name="Echo Adapter Info",
            search_aliases=("lora info", "metadata", "inspect", "lora"),
            description="What is in an adapter: subject, base model, settings, licences.",
            inputs=adapter_inputs(),
            outputs=[io.String.Output(display_name="text", tooltip="The facts, a line each.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None, from_training: Any = UNLINKED) -> bool | str:
        """A listed adapter that is gone by now is told before anything runs."""
        return check_name(adapter_name, from_training)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_: Any) -> Any:
        """Read again when the file changes."""
        return file_state(adapter_name)

    @classmethod
    @shown_on_node
    def execute(cls, adapter_name: str, role: str, from_training: AdapterFiles | None = None) -> io.NodeOutput:
        """The facts as text; without an adapter, the words that ask for one."""
        if from_training is None and adapter_name == NONE:
            text = "choose an adapter: connect one from training or from Load Echo Adapter, or choose one in the list"
        else:
            if from_training is not None and len(from_training.paths) == 1:
                (role,) = from_training.paths
            path = adapter_file(from_training, role, adapter_name)
            text = "\n".join([*lines(adapter_facts(read_adapter(path))), f"file  {path.name}"])
        say(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
