"""LoadEchoAdapter: a learned subject on MODEL and CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..echodistill_core.adapter.file import Adapter, read_adapter
from ..echodistill_core.concept.prompts import TEMPLATES, caption
from ..echodistill_core.errors import InputError
from .bridge.fit import check_fit
from .bridge.places import NONE, adapter_names, adapter_path
from .bridge.sockets import AdapterFiles, AdapterSocket
from .bridge.weights import UNET_PREFIX
from .bridge.widgets import advanced
from .bridge.words import noun_rows, teach
from .reference_images import CATEGORY

ROLES = ["student", "teacher"]
UNLINKED = "unlinked"  # ComfyUI gives None for a linked input, and nothing for a free one


class LoadEchoAdapter(io.ComfyNode):
    """Weights on the model, and the placeholder's meaning in the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return io.Schema(
            node_id="LoadEchoAdapter",
            display_name="Load Echo Adapter",
            category=CATEGORY,
            description=(
                "Puts a learned subject on a model and teaches the CLIP its placeholder, which then works in every "
                "stock node that encodes text. Several in a row work, each with a placeholder of its own."
            ),
            inputs=[
                io.Model.Input(
                    "base_model", display_name="model", tooltip="The model that the adapter was trained on."
                ),
                io.Clip.Input("base_clip", display_name="clip", tooltip="Its text encoder."),
                AdapterSocket.Input(
                    "from_training",
                    display_name="adapter",
                    optional=True,
                    tooltip="From training; used in place of the list.",
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=[NONE, *adapter_names()],
                    default=NONE,
                    tooltip="An adapter in ComfyUI's loras folders; Save Echo Adapter puts them into output/loras.",
                ),
                io.Combo.Input(
                    "role",
                    options=ROLES,
                    default="student",
                    tooltip="Which of the socket's two adapters: the student's for one step, the teacher's for many.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the change of the weights; 0 leaves the model as it is.",
                ),
                io.Float.Input(
                    "strength_token",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="From the class noun's meaning (0) to what the placeholder has learned (1).",
                ),
                advanced(
                    io.Boolean.Input(
                        "any_base",
                        default=False,
                        tooltip="Accept an adapter that was trained on another checkpoint of the same shapes.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the subject in it."),
                io.Clip.Output(display_name="clip", tooltip="The CLIP that knows the placeholder."),
                io.String.Output(
                    display_name="prompt_stub", tooltip="How prompts name the subject: photo of a <new1> dog."
                ),
            ],
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
    def execute(
        cls,
        base_model: Any,
        base_clip: Any,
        adapter_name: str,
        role: str,
        strength_model: float,
        strength_token: float,
        any_base: bool,
        from_training: AdapterFiles | None = None,
    ) -> io.NodeOutput:
        """The model and the CLIP with the adapter on."""
        adapter = read_adapter(adapter_file(from_training, role, adapter_name))
        check_fit(adapter, base_model, base_clip, any_base=any_base)
        stub = caption(TEMPLATES[0], adapter.placeholder, adapter.class_noun)
        return io.NodeOutput(
            put_on(base_model, adapter, strength_model),
            teach(base_clip, adapter.placeholder, adapter.class_noun, rows_at(base_clip, adapter, strength_token)),
            stub,
        )


def check_name(name: str | None, from_training: Any) -> bool | str:
    """True, or what is wrong with a name from the list. None of a name: another node will bring it.

    from_training: UNLINKED where the socket is free; then alone does the name count.
    """
    if from_training is not UNLINKED or name in (None, NONE):
        return True
    try:
        adapter_path(str(name))
    except InputError as error:
        return str(error)
    return True


def file_state(name: str) -> Any:
    """What changes when a listed file does."""
    if name == NONE:
        return NONE
    stat = adapter_path(name).stat()
    return [stat.st_mtime_ns, stat.st_size]


def adapter_file(from_training: AdapterFiles | None, role: str, name: str = NONE) -> Path:
    """The file that a node is to read: the socket's of this role, or the listed one. Raises InputError for neither."""
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


def put_on(model: Any, adapter: Adapter, strength: float) -> Any:
    """A clone of the MODEL with the adapter's differences as patches.

    Raises InputError where ComfyUI would not take one of them, which it would only log.
    """
    patched = model.clone()
    patches = {f"{UNET_PREFIX}{name}": ("diff", (delta,)) for name, delta in adapter.all_deltas().items()}
    shapes = {key: tuple(weight.shape) for key, weight in model.model_state_dict(UNET_PREFIX).items()}
    wrong = [key for key, (_, (delta,)) in patches.items() if shapes.get(key) != tuple(delta.shape)]
    taken = [] if wrong else patched.add_patches(patches, strength)
    wrong = wrong or [key for key in patches if key not in taken]
    if wrong:
        raise InputError(
            f"{adapter.origin} has {len(wrong)} weights that do not fit this model, the first is {wrong[0]}; it was "
            f"trained on {adapter.metadata.get('base_model', 'another base model')}."
        )
    return patched


def rows_at(clip: Any, adapter: Adapter, strength: float) -> torch.Tensor:
    """The placeholder's embeddings at this strength, from the class noun's (0) to the learned ones (1)."""
    start = noun_rows(clip, adapter.class_noun, len(adapter.rows))
    # lerp is exact at both ends.
    return torch.lerp(start, adapter.rows, strength)
