"""LoadEchoAdapter: applies an adapter to a MODEL and a CLIP."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..echodistill_core.adapter.apply import interpolated_embeddings
from ..echodistill_core.adapter.file import Adapter, read_adapter
from ..echodistill_core.concept.prompts import TEMPLATES, caption
from ..echodistill_core.errors import InputError
from .bridge.adapters import UNLINKED, adapter_file, adapter_inputs, check_name, file_state
from .bridge.fit import check_fit
from .bridge.node_text import note, shown_on_node
from .bridge.placeholders import noun_embeddings, with_placeholder
from .bridge.sockets import AdapterFiles, AdapterSocket
from .bridge.weights import UNET_PREFIX
from .bridge.widgets import advanced, schema


class LoadEchoAdapter(io.ComfyNode):
    """Patches the model's weights and adds the placeholder's embeddings to the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="LoadEchoAdapter",
            display_name="Load Echo Adapter",
            search_aliases=(
                "lora",
                "load lora",
                "dreambooth",
                "textual inversion",
                "embedding",
                "subject",
                "personalize",
                "token",
            ),
            description=(
                "Applies an adapter to a model and adds its placeholder to the CLIP. The placeholder then works in "
                "every stock node that encodes text. Several adapters can be chained, each with its own placeholder."
            ),
            inputs=[
                io.Model.Input(
                    "base_model", display_name="model", tooltip="The model that the adapter was trained on."
                ),
                io.Clip.Input("base_clip", display_name="clip", tooltip="Its text encoder."),
                *adapter_inputs(),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the weight update; 0 leaves the model unchanged.",
                ),
                io.Float.Input(
                    "strength_token",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Interpolates from the class noun's embedding (0) to the learned embedding (1).",
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
                io.Model.Output(display_name="model", tooltip="The model with the adapter applied."),
                io.Clip.Output(display_name="clip", tooltip="The CLIP with the placeholder added."),
                io.String.Output(
                    display_name="prompt_stub",
                    tooltip="How a prompt names the subject: photo of a <new1> dog.",
                ),
                AdapterSocket.Output(display_name="adapter", tooltip="The adapter itself, for Echo Adapter Info."),
            ],
            hidden=[io.Hidden.unique_id],
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
        """Return the MODEL and the CLIP with the adapter applied."""
        path = adapter_file(from_training, role, adapter_name)
        adapter = read_adapter(path)
        difference = check_fit(adapter, base_model, base_clip, any_base=any_base)
        if difference:
            note(difference)
        stub = caption(TEMPLATES[0], adapter.placeholder, adapter.class_noun)
        initial = noun_embeddings(base_clip, adapter.class_noun, len(adapter.token_embeddings))
        token_embeddings = interpolated_embeddings(adapter, initial, strength_token)
        return io.NodeOutput(
            apply_adapter(base_model, adapter, strength_model),
            with_placeholder(base_clip, adapter.placeholder, adapter.class_noun, token_embeddings),
            stub,
            AdapterFiles({adapter.role: path}),
        )


def apply_adapter(model: Any, adapter: Adapter, strength: float) -> Any:
    """Return a clone of the MODEL with the adapter's weight differences as patches, scaled by `strength`.

    Raises InputError if a difference does not fit the model; ComfyUI would skip it and only log that.
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
            f"trained on another base model ({adapter.base_model})."
        )
    return patched
