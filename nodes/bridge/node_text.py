"""The text on a node: its state, the notes that stay beside it, and every message of the pack before it is raised."""

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
        "__doc__": "A user's mistake, in one sentence, as ComfyUI shows it: `EchoDistill: ...`.",
    },
)


class NodeText:
    """What a node shows while it runs: one text that is replaced, and notes that stay below it to the end."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.state = ""
        self.is_final = False  # whether the state says how the run of the node ended
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note on the node, and in ComfyUI's log."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("EchoDistill: %s", text)
            self.show()

    def say(self, text: str, *, is_final: bool = False) -> None:
        """Replace the state."""
        self.state, self.is_final = text, is_final
        self.show()

    def show(self) -> None:
        """Send state and notes to the client that runs the node."""
        _send(self.node_id, "\n".join(filter(None, [self.state, *self.notes])))


_current: ContextVar[NodeText | None] = ContextVar("echodistill_node_text", default=None)
_with_text: set[str] = set()  # nodes that show a text, which the next run has to replace or clear


def say(node_id: str | None, text: str, *, is_final: bool = False) -> None:
    """Show a text on a node, above the notes that it has taken while it ran.

    is_final: whether it says how the run of the node ended, so that Cancel adds nothing.
    """
    current = _current.get()
    if current is not None and current.node_id == node_id:
        current.say(text, is_final=is_final)
    else:
        _send(node_id, text)


def note(text: str) -> None:
    """Keep a note on the node that is running."""
    current = _current.get()
    if current is None:
        log.warning("EchoDistill: %s", text)
    else:
        current.note(text)


def shown_on_node(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Let a node's `execute` show its warnings and errors on the node itself.

    Every notice of the core becomes a note. Its errors are said on the node and raised as NodeError, which ComfyUI
    shows as `EchoDistill: ...`; those by which ComfyUI frees its memory are raised as they are.
    """

    @functools.wraps(execute)
    def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Any:
        text = NodeText(cls.hidden.unique_id)
        token = _current.set(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", Notice)
                warnings.showwarning = _as_note(warnings.showwarning)
                result = execute(cls, *args, **kwargs)
        except EchoDistillError as error:
            text.say(str(error))
            if isinstance(error, mm.OOM_EXCEPTION):
                raise
            raise NodeError(str(error)) from None
        except mm.InterruptProcessingException:
            if not text.is_final:
                text.say("cancelled")
            raise
        except BaseException as error:
            text.say(f"stopped by an error of another kind: {shortened(error)}")
            raise
        finally:
            _current.reset(token)
        if not text.state and not text.notes and text.node_id in _with_text:
            _send(text.node_id, "")
        return result

    return wrapper


def _as_note(otherwise: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            note(str(message))
        else:
            otherwise(message, category, *where, **more)

    return show


def _send(node_id: str | None, text: str) -> None:
    server = PromptServer.instance
    if node_id is None or server is None:
        return
    (_with_text.add if text else _with_text.discard)(node_id)
    # The front end takes it for HTML, in which <new1> would be a tag and vanish.
    server.send_progress_text(html.escape(text, quote=False), node_id, server.client_id)
