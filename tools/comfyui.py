"""HTTP client for a running ComfyUI server."""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request
from typing import Any

from PIL import Image


def run(server: str, prompt: dict[str, Any]) -> dict[str, list[Image.Image]]:
    """Queue a prompt, wait until it ends, and return each node's pictures. Raises RuntimeError if it fails."""
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{server}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        identity = json.loads(answer.read())["prompt_id"]
    while not (history := get(server, f"history/{identity}")):
        time.sleep(1)
    done = history[identity]
    if done["status"]["status_str"] != "success":
        raise RuntimeError(json.dumps(done["status"]["messages"][-1]))
    found = {}
    for key, output in done["outputs"].items():
        found[key] = [picture(server, image) for image in output.get("images", [])]
    return found


def get(server: str, path: str) -> Any:
    """The server's JSON response to GET `path`."""
    with urllib.request.urlopen(f"{server}/{path}", timeout=60) as answer:
        return json.loads(answer.read())


def picture(server: str, image: dict[str, str]) -> Image.Image:
    """Download a picture listed in a node's outputs, as RGB."""
    with urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(image)}", timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")
