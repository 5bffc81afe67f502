"""The text on a node: its status, notes that stay below the status, and error messages."""

from __future__ import annotations

import functools
import html
import logging
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import comfy.model_management as mm
from server import PromptServer

from ...echodistill_core.errors import EchoDistillError, Notice
from ...echodistill_core.messages import shortened

log = logging.getLogger(__name__)

# ComfyUI shows an exception's class before its message, with the module unless that is "builtins".
NodeError = type(
    "EchoDistill",
    (Exception,),
    {
        "__module__": "builtins",
        "__doc__": "A user error in one sentence, shown by ComfyUI as `EchoDistill: ...`.",
    },
)


class NodeText:
    """The text of a node that is running: a status that is replaced, and notes that stay below it until the end."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.status = ""
        self.is_final = False  # whether the status says how the run of the node ended
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Add a note to the node and to ComfyUI's log."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("EchoDistill: %s", text)
            self.show()

    def set_status(self, text: str, *, is_final: bool = False) -> None:
        """Replace the status."""
        self.status, self.is_final = text, is_final
        self.show()

    def show(self) -> None:
        """Send status and notes to the client that queued the prompt."""
        _send(self.node_id, "\n".join(filter(None, [self.status, *self.notes])))


_current: ContextVar[NodeText | None] = ContextVar("echodistill_node_text", default=None)
_nodes_with_text: set[str] = set()  # nodes that show a text; their next run replaces or clears it


def set_status(node_id: str | None, text: str, *, is_final: bool = False) -> None:
    """Show a status on a node, above its notes.

    is_final: whether it says how the run of the node ended; Cancel then does not replace it.
    """
    current = _current.get()
    if current is not None and current.node_id == node_id:
        current.set_status(text, is_final=is_final)
    else:
        _send(node_id, text)


def note(text: str) -> None:
    """Add a note to the running node."""
    current = _current.get()
    if current is None:
        log.warning("EchoDistill: %s", text)
    else:
        current.note(text)


def shown_on_node(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a node's `execute` so that warnings and errors are shown on the node.

    Every Notice of the core becomes a note. Errors of the core become the status and are raised as NodeError, which
    ComfyUI shows as `EchoDistill: ...`. Out-of-memory errors are raised unchanged, because ComfyUI frees its models
    when it sees one.
    """

    @functools.wraps(execute)
    def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Any:
        text = NodeText(cls.hidden.unique_id)
        token = _current.set(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", Notice)
                warnings.showwarning = _note_notices(warnings.showwarning)
                result = execute(cls, *args, **kwargs)
        except EchoDistillError as error:
            text.set_status(str(error))
            if isinstance(error, mm.OOM_EXCEPTION):
                raise
            raise NodeError(str(error)) from None
        except mm.InterruptProcessingException:
            if not text.is_final:
                text.set_status("cancelled")
            raise
        except BaseException as error:
            text.set_status(f"stopped by an error of another kind: {shortened(error)}")
            raise
        finally:
            _current.reset(token)
        if not text.status and not text.notes and text.node_id in _nodes_with_text:
            _send(text.node_id, "")
        return result

    return wrapper


def _note_notices(fallback: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            note(str(message))
        else:
            fallback(message, category, *where, **more)

    return show


def _send(node_id: str | None, text: str) -> None:
    server = PromptServer.instance
    if node_id is None or server is None:
        return
    (_nodes_with_text.add if text else _nodes_with_text.discard)(node_id)
    # The front end renders the text as HTML, where <new1> would be an unknown tag.
    server.send_progress_text(html.escape(text, quote=False), node_id, server.client_id)
