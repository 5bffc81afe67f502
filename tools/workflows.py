"""Updates workflows/*.json after the pack's widgets changed, and generates their thumbnails.

    python -m tools.workflows http://127.0.0.1:8188               the workflows; then run tools.locales
    python -m tools.workflows http://127.0.0.1:8188 --thumbnails  the thumbnails too, by running the workflows

To edit a workflow, open it in the oldest ComfyUI that the pack supports and export it over the file. Workflows store
widget values by position, so a new or removed widget shifts them; this tool moves the values to their new positions.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

from .comfyui import get, run
from .locales import FILE as NODE_DEFS

FOLDER = Path(__file__).parents[1] / "workflows"
# Titles of the templates in their order in the template browser.
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
TOY = {"iterations": 200, "preview_every": 20}  # training of the miniature; the defaults are Stable Diffusion's
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_names(description: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Name, default and whether a control value follows, for each widget of a node, in the order of storage."""
    found = []
    for section in ("required", "optional"):
        for name, (kind, *rest) in description["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            if isinstance(kind, list) or kind in WIDGETS:
                choices = kind if isinstance(kind, list) else options.get("options", [])
                default = options.get("default", choices[0] if choices else "")
                found.append((name, default, bool(options.get("control_after_generate"))))
    return found


def refit(saved: dict[str, Any], before: dict[str, Any], info: dict[str, Any]) -> None:
    """Rewrite a workflow's widget values for the present widgets of the pack's nodes, in place.

    before: locales/en/nodeDefs.json, which lists each node's inputs in the order in which the values were stored.
    A new widget gets its default. Raises ValueError if a node's values do not match that order.
    """
    for node in saved["nodes"]:
        if node["type"] not in before:
            continue
        sockets = {entry["name"] for entry in node["inputs"]}
        present = widget_names(info[node["type"]])
        controlled = {name for name, _, is_controlled in present if is_controlled}
        values = iter(node["widgets_values"])
        stored: dict[str, list[Any]] = {}
        for name in before[node["type"]]["inputs"]:
            if name not in sockets:
                stored[name] = list(itertools.islice(values, 2 if name in controlled else 1))
        if [] in stored.values() or list(values):
            raise ValueError(f"{node['type']}: the values do not match {NODE_DEFS}; run this before tools.locales.")
        fresh = {name: [default, *(["fixed"] if is_controlled else [])] for name, default, is_controlled in present}
        node["widgets_values"] = [value for name in fresh for value in stored.get(name, fresh[name])]


def prompt_of(saved: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Convert a saved workflow to the API form, as the front end does when it queues it."""
    links = {link: [str(origin), slot] for link, origin, slot, *_ in saved["links"]}
    prompt = {}
    for node in saved["nodes"]:
        if node["type"] not in info:
            continue
        inputs: dict[str, Any] = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        values = iter(node["widgets_values"])
        for name, _, controlled in widget_names(info[node["type"]]):
            inputs[name] = next(values)
            if controlled:
                next(values)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def with_miniature(prompt: dict[str, Any], adapter: str) -> dict[str, Any]:
    """A prompt that runs without downloads: checkpoints are replaced by the miniature.

    adapter: listed name of an adapter trained on the miniature, for nodes without an adapter socket.
    """
    checkpoints = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    result = {key: node for key, node in prompt.items() if key not in checkpoints}
    # Outputs of Load Checkpoint (student, teacher) -> outputs of Load Miniature.
    outputs = {}
    if checkpoints:
        student, teacher = checkpoints
        outputs = {(student, 0): 0, (teacher, 0): 1, (teacher, 1): 2, (student, 2): 3}
        result["miniature"] = {"class_type": "LoadMiniature", "inputs": {"toy": "striped-cat"}}
    for node in result.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and tuple(value) in outputs:
                inputs[name] = ["miniature", outputs[tuple(value)]]
        if checkpoints and node["class_type"] == "LoadReferenceImages":
            inputs |= {"images": ["miniature", 4], "class_noun": "cat"}
        if checkpoints and node["class_type"] == "EchoDistillTrain":
            inputs |= TOY
        if checkpoints and node["class_type"] == "OneStepSample":
            inputs |= {"width": 64, "height": 64, "prompt": inputs["prompt"].replace("dog", "cat"), "batch_size": 4}
        if "adapter_name" in inputs and "from_training" not in inputs:
            inputs["adapter_name"] = adapter
    return result


def thumbnail_nodes(saved: dict[str, Any]) -> list[str]:
    """Ids of the nodes whose pictures make the thumbnail: untitled previews, and photographs read from a folder."""
    return [
        str(node["id"])
        for node in saved["nodes"]
        if (node["type"] == "PreviewImage" and "title" not in node)
        or (node["type"] == "LoadReferenceImages" and all(entry["link"] is None for entry in node["inputs"]))
    ]


def thumbnail(pictures: list[list[Image.Image]], side: int = 256) -> Image.Image:
    """Up to four pictures of each node, one row per node, enlarged without interpolation; 2 * side pixels wide."""
    columns = 4 if len(pictures) > 1 else 2
    rows = pictures if len(pictures) > 1 else [pictures[0][:2], pictures[0][2:4]]
    cell = side * 2 // columns
    sheet = Image.new("RGB", (columns * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row[:columns]):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x * cell, y * cell))
    return sheet


def main() -> None:
    """Update the workflows, and with --thumbnails their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="of a running ComfyUI with this pack, http://127.0.0.1:8188")
    parser.add_argument("--thumbnails", action="store_true", help="run all workflows with the miniature, 10 minutes")
    arguments = parser.parse_args()
    info = get(arguments.server, "object_info")
    before = json.loads(NODE_DEFS.read_text(encoding="utf-8"))
    for name in WORKFLOWS:
        path = FOLDER / f"{name}.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        refit(saved, before, info)
        path.write_text(f"{json.dumps(saved, indent=1, ensure_ascii=False)}\n", encoding="utf-8")
        if arguments.thumbnails:
            adapters = get(arguments.server, "object_info/LoadEchoAdapter")["LoadEchoAdapter"]["input"]["required"]
            listed = adapters["adapter_name"][1]["options"] if len(adapters["adapter_name"]) > 1 else []
            made = run(arguments.server, with_miniature(prompt_of(saved, info), listed[-1] if listed else "none"))
            thumbnail([made[key] for key in thumbnail_nodes(saved)]).save(FOLDER / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
