"""Writes workflows/*.json and their thumbnails, from the graphs below and what a running ComfyUI says of its nodes.

    python -m tools.workflows http://127.0.0.1:8188              the workflows
    python -m tools.workflows http://127.0.0.1:8188 --thumbnails  the pictures too, by running them with the miniature

A workflow stores widgets by position, so its nodes' own order has to be asked for.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parents[1] / "workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass
class Node:
    """One node: where it lies, how large it is, its widgets that are not at their default, and what comes in."""

    kind: str
    x: int
    y: int
    width: int = 320
    height: int = 120
    widgets: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""


Graph = dict[str, Node]


def note(text: str, x: int, y: int, width: int = 420, height: int = 300) -> Node:
    """A note in Markdown."""
    return Node("MarkdownNote", x, y, width, height, {"text": text}, title="Read me")


def training(x: int, models: str, *, noun: str, images: bool, y: int = 0, **widgets: Any) -> Graph:
    """Concept and training, wired to a loader whose outputs are student, teacher, CLIP, VAE and photographs."""
    concept: dict[str, tuple[str, int]] = {"images": (models, 4)} if images else {}
    sockets = {"student": (models, 0), "teacher": (models, 1), "clip": (models, 2), "vae": (models, 3)}
    return {
        "concept": Node("LoadReferenceImages", x, y, 320, 420, {"class_noun": noun}, concept),
        "train": Node("EchoDistillTrain", x + 360, y, 360, 620, widgets, {**sockets, "concept": ("concept", 0)}),
    }


def sampling(
    x: int,
    y: int,
    adapter: tuple[str, int],
    sockets: dict[str, tuple[str, int]],
    side: int,
    prompt: str,
    name: str = "",
    **widgets: Any,
) -> Graph:
    """Adapter, one-step sampling and its picture."""
    return {
        f"adapter{name}": Node(
            "LoadEchoAdapter",
            x,
            y,
            320,
            240,
            {},
            {"base_model": sockets["model"], "base_clip": sockets["clip"], "from_training": adapter},
        ),
        f"sample{name}": Node(
            "OneStepSample",
            x + 360,
            y,
            340,
            380,
            {"prompt": prompt, "width": side, "height": side, **widgets},
            {"model": (f"adapter{name}", 0), "clip": (f"adapter{name}", 1), "vae": sockets["vae"]},
        ),
        f"show{name}": Node("PreviewImage", x + 740, y, 360, 380, {}, {"images": (f"sample{name}", 0)}),
    }


MINIATURE = {"model": ("models", 0), "clip": ("models", 2), "vae": ("models", 3)}
TOY = {"iterations": 200, "preview_every": 20}  # the miniature's own number; Stable Diffusion's is the default


def miniature() -> Graph:
    """Train and sample with what comes with the pack."""
    text = """## A toy, learned in a minute, no download

**Press Run.** The miniature is a small diffusion family that comes with the pack (64x64 pictures). Its teacher and its
one-step student learn the toy's five photographs; then every prompt with `<new1>` draws that toy in one step.

- `Train EchoDistill` shows samples while it learns. Cancel it, run again: it goes on.
- Then change the **prompt** of `One-Step Sample`, or choose **Run (On Change)** beside the Run button and type.
- Other toys: `toy` in `Load Miniature`, and the noun in `Load Reference Images`.

With SD-Turbo and photographs of your own: the workflow *2_sd_turbo*."""
    return {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180),
        **training(460, "models", noun="mug", images=True, **TOY),
        **sampling(1240, 0, ("train", 1), MINIATURE, 64, "photo of a <new1> mug on the beach", batch_size=4),
        "losses": Node("PreviewImage", 1240, 460, 700, 420, {}, {"images": ("train", 3)}, title="Losses"),
    }


def sd_turbo() -> Graph:
    """The same with Stable Diffusion."""
    text = """## Your dog in one step

1. `Load Checkpoint` **student**: SD-Turbo (`sd_turbo.safetensors`); **teacher**: SD 2.1
   (`v2-1_768-ema-pruned.safetensors`).
2. Put 3-5 photographs into a folder of ComfyUI's `input` folder, press **R**, choose it in `Load Reference Images`, and
   write what they show (`dog`).
3. The critics' backbones: run `python -m echodistill_core download backbones` in the pack's folder, or let training
   tell you what it misses.
4. **Run.** Training is kept in `output/echodistill`: cancel and go on as you like.

`Save Echo Adapter` puts the result into `output/loras` for other graphs."""
    return {
        "note": note(text, 0, 0, 420, 340),
        "student": Node(
            "CheckpointLoaderSimple",
            0,
            400,
            360,
            120,
            {"ckpt_name": "sd_turbo.safetensors"},
            title="Load Checkpoint: student",
        ),
        "teacher": Node(
            "CheckpointLoaderSimple",
            0,
            580,
            360,
            120,
            {"ckpt_name": "v2-1_768-ema-pruned.safetensors"},
            title="Load Checkpoint: teacher",
        ),
        "concept": Node("LoadReferenceImages", 460, 0, 320, 420, {"class_noun": "dog"}),
        "train": Node(
            "EchoDistillTrain",
            820,
            0,
            360,
            620,
            {},
            {
                "student": ("student", 0),
                "teacher": ("teacher", 0),
                "clip": ("teacher", 1),
                "vae": ("student", 2),
                "concept": ("concept", 0),
            },
        ),
        **sampling(
            1240,
            0,
            ("train", 1),
            {"model": ("student", 0), "clip": ("teacher", 1), "vae": ("student", 2)},
            512,
            "photo of a <new1> dog on the beach",
        ),
        "save": Node(
            "SaveEchoAdapter", 1240, 460, 320, 160, {"filename_prefix": "dog"}, {"from_training": ("train", 1)}
        ),
        "losses": Node("PreviewImage", 1600, 460, 700, 420, {}, {"images": ("train", 3)}, title="Losses"),
    }


def real_time() -> Graph:
    """A saved adapter, sampled as one types."""
    text = """## As fast as you type

1. Choose the adapter that `Save Echo Adapter` wrote (press **R** to have the list made again).
2. Choose **Run (On Change)** in the menu beside the Run button, and type in the prompt: every change is a new picture.
   A seed on *fixed* keeps the scene, *randomize* draws another each time.

For SD-Turbo put `Load Checkpoint` in place of `Load Miniature` (student MODEL and VAE of SD-Turbo, CLIP of the teacher)
and set the size to 512. Start ComfyUI with `--highvram` so that models stay on the GPU; a TAESD in place of the VAE
decodes faster."""
    graph: Graph = {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180),
        **sampling(460, 0, ("", 0), MINIATURE, 64, "photo of a <new1> mug in the snow", batch_size=4),
        "info": Node("EchoAdapterInfo", 460, 320, 320, 160),
    }
    graph["adapter"].inputs.pop("from_training")
    return graph


def two_concepts() -> Graph:
    """Two adapters in a row."""
    text = """## Two toys, one model

Two trainings with a placeholder each, `<new1>` and `<new2>`; two `Load Echo Adapter` in a row. Each placeholder works
in every prompt behind both: `<new1> mug`, `<new2> cat`, or both in one.

Two adapters in one picture share the same weights, so their subjects may lend each other colours. If one is too strong,
lower its `strength_model`."""
    graph: Graph = {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180, {"toy": "dotted-mug"}),
        **training(460, "models", noun="mug", images=True, **TOY),
        "models2": Node("LoadMiniature", 0, 1000, 320, 180, {"toy": "striped-cat"}, title="The other toy"),
        "concept2": Node(
            "LoadReferenceImages",
            460,
            1000,
            320,
            420,
            {"class_noun": "cat", "placeholder": "<new2>"},
            {"images": ("models2", 4)},
        ),
        "train2": Node(
            "EchoDistillTrain",
            820,
            1000,
            360,
            620,
            TOY,
            {
                "student": ("models", 0),
                "teacher": ("models", 1),
                "clip": ("models", 2),
                "vae": ("models", 3),
                "concept": ("concept2", 0),
            },
        ),
        **sampling(1240, 0, ("train", 1), MINIATURE, 64, "photo of a <new1> mug on the beach", batch_size=4),
        "second": Node(
            "LoadEchoAdapter",
            1240,
            460,
            320,
            240,
            {},
            {"base_model": ("adapter", 0), "base_clip": ("adapter", 1), "from_training": ("train2", 1)},
        ),
        "sample2": Node(
            "OneStepSample",
            1600,
            460,
            340,
            380,
            {"prompt": "photo of a <new2> cat on the beach", "width": 64, "height": 64, "batch_size": 4},
            {"model": ("second", 0), "clip": ("second", 1), "vae": ("models", 3)},
        ),
        "show2": Node("PreviewImage", 1980, 460, 360, 380, {}, {"images": ("sample2", 0)}),
        "sample3": Node(
            "OneStepSample",
            1600,
            900,
            340,
            380,
            {"prompt": "photo of a <new1> mug and a <new2> cat", "width": 64, "height": 64, "batch_size": 4},
            {"model": ("second", 0), "clip": ("second", 1), "vae": ("models", 3)},
        ),
        "show3": Node("PreviewImage", 1980, 900, 360, 380, {}, {"images": ("sample3", 0)}),
    }
    graph["sample"].inputs.update({"model": ("second", 0), "clip": ("second", 1)})
    return graph


def echo() -> Graph:
    """Before and after the echo, side by side."""
    text = """## What the echo does

`Echo Stage` lets the student draw a pool of pictures; both models go on learning from those. Above: the student as
distilled. Below: after the echo, with the same seed and prompt. `Score Echo` measures both: CLIP-T (the prompt), CLIP-I
and DINO (the subject).

More iterations echo more of the subject and less of the prompt."""
    graph: Graph = {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180),
        **training(460, "models", noun="mug", images=True, **TOY),
        "echo": Node("EchoStage", 1240, 460, 340, 420, {"iterations": 80}, {"trained": ("train", 0)}),
    }
    prompt = "photo of a <new1> mug on the beach"
    graph |= sampling(1640, 0, ("train", 1), MINIATURE, 64, prompt, batch_size=4)
    graph |= sampling(1640, 460, ("echo", 1), MINIATURE, 64, prompt, "_echoed", batch_size=4)
    for name, y in (("", 0), ("_echoed", 460)):
        graph[f"score{name}"] = Node(
            "ScoreEcho",
            2780,
            y,
            320,
            240,
            {"prompt": prompt, "protocol": "miniature"},
            {"images": (f"sample{name}", 0), "concept": ("concept", 0)},
        )
    return graph


def teacher() -> Graph:
    """Both players with their adapters."""
    text = """## Teacher and student

Training gives two adapters. Above: the **student** in one step. Below: the **teacher** in 25 steps with guidance, by
ComfyUI's own nodes; its `Load Echo Adapter` has `role` teacher. The same prompt, the same word."""
    prompt = "photo of a <new1> mug on the beach"
    return {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180),
        **training(460, "models", noun="mug", images=True, **TOY),
        **sampling(1240, 0, ("train", 1), MINIATURE, 64, prompt, batch_size=4),
        "adapter_teacher": Node(
            "LoadEchoAdapter",
            1240,
            460,
            320,
            240,
            {"role": "teacher"},
            {"base_model": ("models", 1), "base_clip": ("models", 2), "from_training": ("train", 1)},
        ),
        "positive": Node("CLIPTextEncode", 1600, 460, 340, 120, {"text": prompt}, {"clip": ("adapter_teacher", 1)}),
        "negative": Node("CLIPTextEncode", 1600, 640, 340, 120, {"text": ""}, {"clip": ("adapter_teacher", 1)}),
        "latent": Node("EmptyLatentImage", 1600, 820, 340, 140, {"width": 64, "height": 64, "batch_size": 4}),
        "ksampler": Node(
            "KSampler",
            1980,
            460,
            340,
            300,
            {"steps": 25, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"},
            {
                "model": ("adapter_teacher", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("latent", 0),
            },
        ),
        "decode": Node("VAEDecode", 2360, 460, 200, 60, {}, {"samples": ("ksampler", 0), "vae": ("models", 3)}),
        "show_teacher": Node("PreviewImage", 2360, 580, 360, 380, {}, {"images": ("decode", 0)}),
    }


# File name without ending -> the graph, and the nodes whose pictures make its thumbnail.
WORKFLOWS = {
    "1_miniature": (miniature, ["show"]),
    "2_sd_turbo": (sd_turbo, ["show"]),
    "3_real_time": (real_time, ["show"]),
    "4_two_concepts": (two_concepts, ["show", "show2", "show3"]),
    "5_echo_compared": (echo, ["show", "show_echoed"]),
    "6_teacher_and_student": (teacher, ["show", "show_teacher"]),
}


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
        result["miniature"] = {"class_type": "LoadMiniature", "inputs": {"toy": "dotted-mug"}}
    for node in result.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and tuple(value) in outputs:
                inputs[name] = ["miniature", outputs[tuple(value)]]
        if checkpoints and node["class_type"] == "LoadReferenceImages":
            inputs |= {"images": ["miniature", 4], "class_noun": "mug"}
        if checkpoints and node["class_type"] == "EchoDistillTrain":
            inputs |= TOY
        if checkpoints and node["class_type"] == "OneStepSample":
            inputs |= {"width": 64, "height": 64, "prompt": inputs["prompt"].replace("dog", "mug"), "batch_size": 4}
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


def run(server: str, prompt: dict[str, Any]) -> dict[str, list[Image.Image]]:
    """Queue a prompt, wait for its end, and return each node's pictures. Raises RuntimeError where it fails."""
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
    """What a ComfyUI server answers, as JSON."""
    with urllib.request.urlopen(f"{server}/{path}", timeout=60) as answer:
        return json.loads(answer.read())


def picture(server: str, image: dict[str, str]) -> Image.Image:
    """A picture that a server lists among a node's outputs."""
    with urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(image)}", timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


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
