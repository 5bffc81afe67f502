"""How fast is prompt to picture in one step, against diffusers' pipeline and ComfyUI's own nodes?

    python -m benchmarks.sample [--scale tiny|full] [--device cpu|cuda] [--batches 1 8 32] [--out FILE.json]
    python -m benchmarks.sample --comfyui http://127.0.0.1:8188 [--adapter NAME]    prompts in a running ComfyUI

Then how long it takes from an adapter's file to the first picture with it. Each batch size is timed with the prompt's
text encoded anew and kept, with the family's VAE and with a decoder of TAESD's architecture (diffusers'
AutoencoderTiny, random weights), in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter, write_adapter
from echodistill_core.errors import EchoDistillError
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.models.family import Family
from echodistill_core.sampling import denoise, draw_noise, sample

from .measure import REPEATS, WARM_UP, Figures, Work, cost, device_name, table, wait
from .workbench import Workbench

PROMPT = "photo of a dog on the beach"
BATCHES = (1, 2, 4, 8, 16, 32)


def pipeline(family: Family) -> Any:
    """diffusers' pipeline of SD-Turbo on the family's networks, as its model card says to use it."""
    family.text.tokenizer.model_max_length = family.text.model.config.max_position_embeddings
    scheduler = EulerDiscreteScheduler(**family.architecture.scheduler, timestep_spacing="trailing", steps_offset=1)
    made = StableDiffusionPipeline(
        family.vae,
        family.text.model,
        family.text.tokenizer,
        family.student.unet,
        scheduler,
        None,
        None,
        None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def ways(family: Family, taesd: Any, count: int) -> dict[str, Work]:
    """Each way to make `count` pictures of one prompt."""
    size = family.architecture.resolution
    with torch.no_grad():
        known = family.condition([PROMPT])
    peer = pipeline(family)

    def latents(text: TextConditioning) -> Tensor:
        noise = draw_noise(family, count, size, size, 0).to(family.device)
        return denoise(family.student, noise, text.expand(count), 1)

    @torch.no_grad()
    def encoded() -> Tensor:
        return family.decode(latents(family.condition([PROMPT])))

    @torch.no_grad()
    def kept() -> Tensor:
        return family.decode(latents(known))

    @torch.no_grad()
    def tiny_decoder() -> Tensor:
        images: Tensor = taesd.decode(latents(known).to(taesd.dtype)).sample.float()
        return images

    def stock() -> Any:
        generator = torch.Generator().manual_seed(0)
        return peer(
            [PROMPT] * count,
            num_inference_steps=1,
            guidance_scale=0.0,
            height=size,
            width=size,
            generator=generator,
            output_type="pt",
        ).images

    return {"diffusers": stock, "ours": encoded, "ours, prompt kept": kept, "ours, TAESD": tiny_decoder}


def measure(opened: Callable[[], Workbench], count: int, dtype: torch.dtype) -> dict[str, Any]:
    """The cost of `count` pictures, each way."""
    bench = opened()
    family = bench.family().to(bench.device, dtype)
    taesd = AutoencoderTiny(latent_channels=4).eval().requires_grad_(False).to(bench.device, dtype)
    return {name: asdict(cost(work, bench.device)) for name, work in ways(family, taesd, count).items()}


def first_picture(opened: Callable[[], Workbench], dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds from an adapter's file to the first picture with it, on a model that is warm: read, put on, sampled.

    first: of a word that is new to this process. again: with another adapter of the same word, the median.
    plain: the picture alone.
    """
    bench = opened()
    adapter = bench.adapter()
    family = bench.family().to(bench.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        write_adapter(path, adapter, bench.architecture)

        def wear() -> None:
            with personalised(family, [read_adapter(path)]) as model:
                sample(model, [f"photo of a {adapter.placeholder} dog"])

        def alone() -> None:
            with personalised(family) as model:
                sample(model, [PROMPT])

        plain = cost(alone, bench.device).seconds
        wait(bench.device)
        begun = time.perf_counter()
        wear()
        wait(bench.device)
        first = time.perf_counter() - begun
        again = cost(wear, bench.device, 1).seconds
    return {"plain": plain * 1e3, "first": first * 1e3, "again": again * 1e3}


def report(figures: Figures, batches: Sequence[int]) -> str:
    """Milliseconds a batch and pictures a second."""
    cells = figures.record["cells"]
    names = list(cells[str(batches[0])])
    seconds = {name: [cells[str(count)][name]["seconds"] for count in batches] for name in names}
    milliseconds = [[name, *(f"{s * 1e3:.1f}" for s in seconds[name])] for name in names]
    rates = [[name, *(f"{n / s:.1f}" for n, s in zip(batches, seconds[name], strict=True))] for name in names]
    header = [str(count) for count in batches]
    adapter = [[name, f"{value:.1f}"] for name, value in cells["adapter"].items()]
    tables = (
        table(["ms by batch", *header], milliseconds),
        table(["pictures/s", *header], rates),
        table(["adapter to picture", "ms"], adapter),
    )
    return "\n\n".join(tables)


def comfyui_overhead(server: str, adapter: str = "") -> dict[str, float]:
    """Milliseconds of one-step prompts of the miniature in a running ComfyUI, each with another seed: medians.

    adapter: one that Load Echo Adapter lists, which each prompt then puts on anew, with another strength.
    whole: from sending the prompt to the message that it is done. node: while One-Step Sample ran. The difference is
    ComfyUI's: validating, queueing, messages, and the picture's file.
    """
    import websocket

    client = uuid.uuid4().hex
    socket = websocket.create_connection(f"{server.replace('http', 'ws', 1)}/ws?clientId={client}", timeout=120)
    whole, node = [], []
    try:
        for i in range(WARM_UP + 3 * REPEATS):
            prompt = _comfyui_prompt(i, adapter)
            body = json.dumps({"prompt": prompt, "client_id": client}).encode()
            begun = time.perf_counter()
            request = urllib.request.Request(f"{server}/prompt", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=120).close()
            running: dict[str, float] = {}
            while True:
                message = socket.recv()
                now = time.perf_counter()
                if not isinstance(message, str):
                    continue
                event = json.loads(message)
                if event["type"] == "executing" and event["data"].get("node"):
                    running[event["data"]["node"]] = now
                if event["type"] == "execution_error":
                    raise RuntimeError(event["data"]["exception_message"])
                if event["type"] == "execution_success":
                    break
            if i >= WARM_UP:
                whole.append(now - begun)
                node.append(running["show"] - running["sample"])
    finally:
        socket.close()
    found = {"whole": statistics.median(whole) * 1e3, "node": statistics.median(node) * 1e3}
    return {**found, "difference": found["whole"] - found["node"]}


def _comfyui_prompt(seed: int, adapter: str) -> dict[str, Any]:
    widgets = {"prompt": PROMPT, "seed": seed, "width": 64, "height": 64, "steps": "1", "batch_size": 1, "denoise": 1.0}
    links = {"model": ["models", 0], "clip": ["models", 2], "vae": ["models", 3]}
    worn: dict[str, Any] = {}
    if adapter:
        bases = {"base_model": links["model"], "base_clip": links["clip"]}
        strengths = {"strength_model": 0.5 + seed / 100, "strength_token": 1.0}
        inputs = {**bases, "adapter_name": adapter, "role": "student", **strengths, "any_base": False}
        worn = {"wear": {"class_type": "LoadEchoAdapter", "inputs": inputs}}
        links |= {"model": ["wear", 0], "clip": ["wear", 1]}
    return {
        **worn,
        "models": {"class_type": "LoadMiniature", "inputs": {"toy": "dotted-mug"}},
        "sample": {"class_type": "OneStepSample", "inputs": {**links, **widgets}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["sample", 0]}},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--comfyui", default="", help="the URL of a running ComfyUI with this pack; times that alone")
    parser.add_argument("--adapter", default="", help="with --comfyui: an adapter of the miniature to put on each time")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.comfyui:
        found = comfyui_overhead(given.comfyui.rstrip("/"), given.adapter)
        print(table(["prompt in ComfyUI", "ms"], [[name, f"{value:.1f}"] for name, value in found.items()]))
        return 0
    device = torch.device(given.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        figures = Figures(given.out, "sample", device, {"scale": given.scale})
        bench = cache(lambda: Workbench(given.scale, device))
        for count in given.batches:
            figures.cell(str(count), partial(measure, bench, count, dtype))
        figures.cell("adapter", partial(first_picture, bench, dtype))
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {given.scale} scale, {dtype}, {figures.record['date']}")
    print(report(figures, given.batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
