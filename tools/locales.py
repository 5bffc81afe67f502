"""Writes locales/en/nodeDefs.json, the names and tooltips of the nodes themselves, from a running ComfyUI.

    python -m tools.locales http://127.0.0.1:8188

Other languages are translated from it by hand; a test tells which words they lack.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .comfyui import get

FILE = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"
CATEGORY = "EchoDistill"


def words_of(description: dict[str, Any]) -> dict[str, Any]:
    """A node's words, in the form that the front end reads."""
    inputs = {}
    for section in ("required", "optional"):
        for name, (_, *rest) in description["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            inputs[name] = {"name": options.get("display_name", name), "tooltip": readable(options["tooltip"])}
    outputs = zip(description["output_name"], description["output_tooltips"], strict=True)
    return {
        "display_name": description["display_name"],
        "description": readable(description["description"]),
        "inputs": inputs,
        "outputs": {str(i): {"name": name, "tooltip": readable(tooltip)} for i, (name, tooltip) in enumerate(outputs)},
    }


def readable(text: str) -> str:
    """Without the characters that the front end's translation library takes for its own syntax."""
    return text.replace("@", " at ").replace("|", "/")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="of a running ComfyUI with this pack, http://127.0.0.1:8188")
    info = get(parser.parse_args().server, "object_info")
    words = {name: words_of(node) for name, node in info.items() if node["category"] == CATEGORY}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(f"{json.dumps(words, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
