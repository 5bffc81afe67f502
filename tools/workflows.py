"""Writes workflows/*.json and their thumbnails, from tools/templates and what a running ComfyUI says of its nodes.

    python -m tools.workflows http://127.0.0.1:8188              the workflows
    python -m tools.workflows http://127.0.0.1:8188 --thumbnails  the pictures too, by running them with the miniature

A workflow stores widgets by position, so its nodes' own order has to be asked for: of the oldest ComfyUI that the pack
runs on, since newer ones know what older nodes lack, but not the other way round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from .comfyui import get, run
from .templates import TOY, WORKFLOWS, Graph

FOLDER = Path(__file__).parents[1] / "workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_names(description: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Name, default, and whether a control follows, of a node's widgets in the order in which they are stored."""
    found = []
    for section in ("required", "optional"):
        for name, (kind, *rest) in description["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            if isinstance(kind, list) or kind in WIDGETS:
                choices = kind if isinstance(kind, list) else options.get("options", [])
                default = options.get("default", choices[0] if choices else "")
                found.append((name, default, bool(options.get("control_after_generate"))))
    return found


def sockets(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and type of a node's inputs that are no widgets."""
    return [
        (name, kind)
        for section in ("required", "optional")
        for name, (kind, *_) in description["input"].get(section, {}).items()
        if not isinstance(kind, list) and kind not in WIDGETS
    ]


def workflow(graph: Graph, info: dict[str, Any]) -> dict[str, Any]:
    """A graph in the form that the front end saves."""
    ids = {key: i for i, key in enumerate(graph, 1)}
    links: list[list[Any]] = []
    nodes = []
    for order, (key, node) in enumerate(graph.items()):
        entry: dict[str, Any] = {
            "id": ids[key],
            "type": node.kind,
            "pos": [node.x, node.y],
            "size": [node.width, node.height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {"Node name for S&R": node.kind},
        }
        if node.models:
            entry["properties"]["models"] = node.models
        if node.title:
            entry["title"] = node.title
        if node.kind == "MarkdownNote":
            entry |= {"widgets_values": [node.widgets["text"]], "color": "#432", "bgcolor": "#653", "properties": {}}
            nodes.append(entry)
            continue
        description = info[node.kind]
        unknown = node.widgets.keys() - {name for name, _, _ in widget_names(description)}
        assert not unknown, f"{node.kind} has no widgets {unknown}"
        for name, kind in sockets(description):
            link = None
            if name in node.inputs:
                origin, slot = node.inputs[name]
                link = len(links) + 1
                links.append([link, ids[origin], slot, ids[key], len(entry["inputs"]), kind])
            entry["inputs"].append({"name": name, "type": kind, "link": link})
        entry["outputs"] = [
            {"name": name, "type": kind, "links": [], "slot_index": i}
            for i, (name, kind) in enumerate(zip(description["output_name"], description["output"], strict=True))
        ]
        values: list[Any] = []
        for name, default, controlled in widget_names(description):
            values.append(node.widgets.get(name, default))
            if controlled:
                values.append("fixed")
        entry["widgets_values"] = values
        nodes.append(entry)
    by_id = {node["id"]: node for node in nodes}
    for link, origin, slot, *_ in links:
        by_id[origin]["outputs"][slot]["links"].append(link)
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def prompt_of(saved: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow in the form that is queued, as the front end makes it of it."""
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
    """A prompt that runs with what comes with the pack: the miniature in place of checkpoints, and a saved adapter.

    adapter: the name of one that was trained on the miniature, for nodes that choose from the list.
    """
    checkpoints = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    result = {key: node for key, node in prompt.items() if key not in checkpoints}
    # Of Load Checkpoint for the student and for the teacher -> of Load Miniature.
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


def thumbnail(pictures: list[list[Image.Image]], side: int = 256) -> Image.Image:
    """Up to four pictures of each kind, a row for each, enlarged without smoothing."""
    columns = 4 if len(pictures) > 1 else 2
    rows = pictures if len(pictures) > 1 else [pictures[0][:2], pictures[0][2:4]]
    cell = side * 2 // columns
    sheet = Image.new("RGB", (columns * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row[:columns]):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x * cell, y * cell))
    return sheet


def main() -> None:
    """Write the workflows, and with --thumbnails their pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="of a running ComfyUI with this pack, http://127.0.0.1:8188")
    parser.add_argument("--thumbnails", action="store_true", help="run them all with the miniature, 10 minutes")
    arguments = parser.parse_args()
    info = get(arguments.server, "object_info")
    FOLDER.mkdir(exist_ok=True)
    for name, (build, shown) in WORKFLOWS.items():
        graph = build()
        saved = workflow(graph, info)
        text = json.dumps(saved, indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
        if arguments.thumbnails:
            adapters = get(arguments.server, "object_info/LoadEchoAdapter")["LoadEchoAdapter"]["input"]["required"]
            listed = adapters["adapter_name"][1]["options"] if len(adapters["adapter_name"]) > 1 else []
            made = run(arguments.server, with_miniature(prompt_of(saved, info), listed[-1] if listed else "none"))
            ids = {key: str(i) for i, key in enumerate(graph, 1)}
            thumbnail([made[ids[key]] for key in shown]).save(FOLDER / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
