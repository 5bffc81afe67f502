"""LoadReferenceImages: the photographs of one subject, its class noun and its placeholder."""

from __future__ import annotations

from functools import cache
from typing import Any

from comfy_api.latest import io, ui

from ..echodistill_core.concept.images import square_images
from ..echodistill_core.concept.photographs import MIN_SIDE, load_photographs
from ..echodistill_core.concept.prompts import subject
from ..echodistill_core.errors import InputError
from ..echodistill_core.models.text import check_class_noun, check_placeholder, clip_tokenizer
from ..echodistill_core.settings import TrainSettings
from .bridge.node_text import set_status, shown_on_node
from .bridge.paths import NONE, folder_state, input_folder, input_folders
from .bridge.pictures import image_of, photographs_of
from .bridge.sockets import Concept, ConceptSocket
from .bridge.widgets import schema, widget

PREVIEW_SIDE = 512


class LoadReferenceImages(io.ComfyNode):
    """Reads photographs from a socket or from a folder inside ComfyUI's input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's sockets and widgets."""
        return schema(
            node_id="LoadReferenceImages",
            display_name="Load Reference Images",
            search_aliases=(
                "dataset",
                "photos",
                "photographs",
                "subject",
                "dreambooth",
                "concept",
                "load images from folder",
            ),
            description="The 3-5 photographs of your dog, mug or toy, with its class noun and its placeholder.",
            inputs=[
                io.Image.Input("images", optional=True, tooltip="The photographs as an IMAGE batch."),
                io.Combo.Input(
                    "folder",
                    options=[NONE, *input_folders()],
                    default=NONE,
                    tooltip="A folder inside ComfyUI's input folder, used instead of the socket or in addition to it.",
                ),
                widget(TrainSettings, "class_noun", default="dog"),
                widget(TrainSettings, "placeholder"),
                widget(TrainSettings, "crop"),
            ],
            outputs=[
                ConceptSocket.Output(display_name="concept", tooltip="The subject, for Train EchoDistill."),
                io.Image.Output(display_name="preview", tooltip="The photographs as training uses them."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        """Report a folder that does not exist, before any node runs. None: the value comes from another node.

        ComfyUI reports an error once for each argument of this method, so `folder` is its only one; `execute` checks
        placeholder and class noun before it reads any file.
        """
        try:
            if folder not in (None, NONE):
                input_folder(str(folder))
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> Any:
        """Changes when the folder's photographs change, so that they are read again."""
        return folder_state(input_folder(folder)) if folder != NONE else NONE

    @classmethod
    @shown_on_node
    def execute(cls, folder: str, class_noun: str, placeholder: str, crop: str, images: Any = None) -> io.NodeOutput:
        """Return the concept and a preview of its photographs."""
        _check_class_noun_and_placeholder(class_noun, placeholder)
        photographs = [] if images is None else photographs_of(images)
        for photograph in photographs:
            if min(photograph.image.size) < MIN_SIDE:
                raise InputError(
                    f"{photograph.name} is {photograph.image.width}x{photograph.image.height} pixels; expected at "
                    f"least {MIN_SIDE} on each side."
                )
        if folder != NONE:
            photographs += load_photographs(input_folder(folder))
        if not photographs:
            raise InputError(
                "there are no photographs; connect an IMAGE, or put 3-5 photographs into a folder of ComfyUI's input "
                "folder and choose it."
            )
        noun = " ".join(class_noun.split())
        preview = image_of(square_images(photographs, PREVIEW_SIDE, crop).pixels.float() / 127.5 - 1)
        sizes = ", ".join(dict.fromkeys(f"{p.image.width}x{p.image.height}" for p in photographs))
        set_status(cls.hidden.unique_id, f"{len(photographs)} photographs of a {subject(placeholder, noun)} ({sizes})")
        concept = Concept(tuple(photographs), noun, placeholder, crop)
        return io.NodeOutput(concept, preview, ui=ui.PreviewImage(preview, cls=cls))


def _check_class_noun_and_placeholder(class_noun: str, placeholder: str) -> None:
    """Raise InputError for a word that cannot be a placeholder, and for an empty class noun."""
    check_placeholder(_tokenizer(), placeholder)
    check_class_noun(class_noun, placeholder)


@cache
def _tokenizer() -> Any:
    """CLIP's tokenizer, cached: loading it takes 0.1 s, and every prompt needs it."""
    return clip_tokenizer(pad_with_end=False)
