"""A real ComfyUI server with its own folder, and a client that queues prompts and receives the messages."""

from __future__ import annotations

import contextlib
import html
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websocket import WebSocketTimeoutException, create_connection

PACK = Path(__file__).parents[2]
START_SECONDS = 3600  # of a server that never answers; pytest ends a test that hangs before that
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # ComfyUI's BinaryEventTypes


@dataclass
class Outcome:
    """The result of one prompt: node -> its ui, the messages in order, and the error, if any."""

    outputs: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    interrupted: bool = False
    ran: list[str] = field(default_factory=list)

    def texts_on(self, node: str) -> list[str]:
        """The texts shown on one node, in order."""
        return [text for shown_on, text in self.texts if shown_on == node]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of the messages of one type."""
        return [message["data"] for message in self.messages if message["type"] == kind]


class RefusedError(Exception):
    """ComfyUI rejected the prompt; the text contains every reason."""


class Server:
    """One ComfyUI process with no other custom nodes than this pack."""

    def __init__(self, comfyui: Path, base: Path, log: Path) -> None:
        self.comfyui, self.base, self.log = comfyui, base, log
        for name in ("custom_nodes", "input", "output", "user", "models/loras", "models/embeddings"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "ComfyUI-EchoDistill"
        if not link.exists():
            link.symlink_to(PACK)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, *flags: str) -> Server:
        """Start with these flags of ComfyUI's and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        front_end = os.environ.get("COMFYUI_FRONT_END", "")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": front_end, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "main.py", "--cpu", "--base-directory", str(self.base), "--port", str(self.port), *flags],
            cwd=self.comfyui,
            env=environment,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("system_stats")
                return self
            time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.text()[-3000:]}")

    def kill(self) -> None:
        """Kill the process without warning."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """The server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The response to GET, parsed as JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def fetch(self, path: str) -> bytes:
        """The response to GET, as bytes."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            return bytes(answer.read())

    def post(self, path: str, data: Any) -> Any:
        """The response to POST of JSON data. Raises RefusedError with the body of an error response."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from None

    def picture(self, image: dict[str, str]) -> bytes:
        """The file behind one entry of a ui's images."""
        return self.fetch(f"view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")

    def memory(self) -> int:
        """Resident bytes of the process."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024

    def run(self, prompt: dict[str, Any], *, seconds: float = START_SECONDS, during: Any = None) -> Outcome:
        """Queue a prompt and wait for its end. during: called with every Outcome so far, after each message."""
        return self.queue(prompt).wait(seconds, during)

    def queue(self, prompt: dict[str, Any]) -> Queued:
        """Queue a prompt. Raises RefusedError if ComfyUI rejects it."""
        return Queued(self, prompt)


class Queued:
    """A prompt queued by its own client."""

    def __init__(self, server: Server, prompt: dict[str, Any]) -> None:
        client = uuid.uuid4().hex
        self.socket = create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=30)
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        self.socket.send(json.dumps(flags))
        self.outcome = Outcome()
        try:
            self.id = server.post("prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
        except RefusedError:
            self.socket.close()
            raise
        self.lock = threading.Lock()

    def wait(self, seconds: float = START_SECONDS, during: Any = None) -> Outcome:
        """Its outcome."""
        deadline = time.monotonic() + seconds
        try:
            while not self._take():
                if during is not None:
                    during(self.outcome)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the prompt did not end in {seconds} s")
        finally:
            self.socket.close()
        return self.outcome

    def _take(self) -> bool:
        """Receive one message; return whether it was the last."""
        try:
            message = self.socket.recv()
        except WebSocketTimeoutException:
            return False
        if isinstance(message, bytes):
            self._binary(message)
            return False
        parsed = json.loads(message)
        self.outcome.messages.append(parsed)
        kind, data = parsed["type"], parsed.get("data", {})
        if data.get("prompt_id") not in (None, self.id):
            return False
        if kind == "executing" and data["node"] is not None:
            self.outcome.ran.append(data["node"])
        elif kind == "executed":
            self.outcome.outputs[data["node"]] = data["output"]
        elif kind == "execution_error":
            self.outcome.error = f"{data['exception_type']}: {data['exception_message']}"
        elif kind == "execution_interrupted":
            self.outcome.interrupted = True
        return kind in ("execution_success", "execution_error", "execution_interrupted")

    def _binary(self, message: bytes) -> None:
        (kind,) = struct.unpack(">I", message[:4])
        if kind == TEXT:
            (length,) = struct.unpack(">I", message[4:8])
            self.outcome.texts.append((message[8 : 8 + length].decode(), html.unescape(message[8 + length :].decode())))
        elif kind == PREVIEW:
            self.outcome.previews.append(message[8:])
        elif kind == PREVIEW_WITH_METADATA:
            (length,) = struct.unpack(">I", message[4:8])
            self.outcome.previews.append(message[8 + length :])
