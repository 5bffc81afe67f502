"""Writes locales/en/nodeDefs.json, the English names and tooltips of the nodes, from a running ComfyUI.

    python -m tools.locales http://127.0.0.1:8188

Other languages are translated from it by hand; tests/comfy/test_nodes.py reports missing entries.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .comfyui import get

FILE = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"
CATEGORY = "EchoDistill"


def node_text(description: dict[str, Any]) -> dict[str, Any]:
    """A node's names and tooltips, in the form that the front end reads."""
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
    """Replace the characters that are syntax to the front end's translation library."""
    return text.replace("@", " at ").replace("|", "/")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="of a running ComfyUI with this pack, http://127.0.0.1:8188")
    info = get(parser.parse_args().server, "object_info")
    texts = {name: node_text(node) for name, node in info.items() if node["category"] == CATEGORY}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(f"{json.dumps(texts, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
