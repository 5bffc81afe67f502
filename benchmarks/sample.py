"""Time from prompt to image in one step, against diffusers' pipeline, or in a running ComfyUI.

    python -m benchmarks.sample [--scale tiny|full] [--device cpu|cuda] [--batches 1 8 32] [--out FILE.json]
    python -m benchmarks.sample --comfyui http://127.0.0.1:8188 [--adapter NAME]    prompts in a running ComfyUI

It also times an adapter file to the first image with this adapter. Each batch size is timed with the prompt encoded in
each call and encoded once, and with the family's VAE and a decoder of TAESD's architecture (diffusers' AutoencoderTiny,
random weights), all in one process.
"""

from __future__ import annotations

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

from .measure import REPEATS, WARM_UP, Figures, Work, argument_parser, cost, device_name, synchronize, table
from .random_models import RandomModels

PROMPT = "photo of a dog on the beach"
BATCHES = (1, 2, 4, 8, 16, 32)


def diffusers_pipeline(family: Family) -> Any:
    """A StableDiffusionPipeline of the family's networks, configured as in SD-Turbo's model card."""
    family.text.tokenizer.model_max_length = family.text.model.config.max_position_embeddings
    scheduler = EulerDiscreteScheduler(**family.architecture.scheduler, timestep_spacing="trailing", steps_offset=1)
    pipeline = StableDiffusionPipeline(
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
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def variants(family: Family, taesd: Any, count: int) -> dict[str, Work]:
    """Functions that sample `count` images of one prompt, by their names in figure files ("ours" is this package).

    diffusers: its pipeline. ours: the prompt is encoded in each call. ours, prompt kept: it is encoded once.
    ours, TAESD: encoded once, and decoded by taesd, an AutoencoderTiny.
    """
    side = family.architecture.resolution
    with torch.no_grad():
        encoded_prompt = family.condition([PROMPT])
    pipeline = diffusers_pipeline(family)

    def latents(text: TextConditioning) -> Tensor:
        noise = draw_noise(family, count, side, side, 0).to(family.device)
        return denoise(family.student, noise, text.expand(count), 1)

    @torch.no_grad()
    def encode_each_time() -> Tensor:
        return family.decode(latents(family.condition([PROMPT])))

    @torch.no_grad()
    def encode_once() -> Tensor:
        return family.decode(latents(encoded_prompt))

    @torch.no_grad()
    def decode_by_taesd() -> Tensor:
        images: Tensor = taesd.decode(latents(encoded_prompt).to(taesd.dtype)).sample.float()
        return images

    def run_pipeline() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            [PROMPT] * count,
            num_inference_steps=1,
            guidance_scale=0.0,
            height=side,
            width=side,
            generator=generator,
            output_type="pt",
        ).images

    return {
        "diffusers": run_pipeline,
        "ours": encode_each_time,
        "ours, prompt kept": encode_once,
        "ours, TAESD": decode_by_taesd,
    }


def measure(get_models: Callable[[], RandomModels], count: int, dtype: torch.dtype) -> dict[str, Any]:
    """The cost of sampling `count` images by each variant."""
    models = get_models()
    family = models.family().to(models.device, dtype)
    taesd = AutoencoderTiny(latent_channels=4).eval().requires_grad_(False).to(models.device, dtype)
    return {name: asdict(cost(work, models.device)) for name, work in variants(family, taesd, count).items()}


def time_to_first_image(get_models: Callable[[], RandomModels], dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds to read an adapter file, apply the adapter and sample one image with a warm model.

    plain: an image without an adapter. first: with an adapter whose placeholder is new to this process.
    again: the median of repeats with the same placeholder.
    """
    models = get_models()
    adapter = models.adapter()
    family = models.family().to(models.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        write_adapter(path, adapter, models.architecture)

        def sample_with_adapter() -> None:
            with personalised(family, [read_adapter(path)]) as model:
                sample(model, [f"photo of a {adapter.placeholder} dog"])

        def sample_without_adapter() -> None:
            with personalised(family) as model:
                sample(model, [PROMPT])

        plain = cost(sample_without_adapter, models.device).seconds
        synchronize(models.device)
        started = time.perf_counter()
        sample_with_adapter()
        synchronize(models.device)
        first = time.perf_counter() - started
        again = cost(sample_with_adapter, models.device, 1).seconds
    return {"plain": plain * 1e3, "first": first * 1e3, "again": again * 1e3}


def report(figures: Figures, batches: Sequence[int]) -> str:
    """Three tables: milliseconds per batch, images per second, and time from an adapter file to an image."""
    cells = figures.record["cells"]
    names = list(cells[str(batches[0])])
    seconds = {name: [cells[str(count)][name]["seconds"] for count in batches] for name in names}
    milliseconds = [[name, *(f"{s * 1e3:.1f}" for s in seconds[name])] for name in names]
    rates = [[name, *(f"{n / s:.1f}" for n, s in zip(batches, seconds[name], strict=True))] for name in names]
    header = [str(count) for count in batches]
    adapter = [[name, f"{value:.1f}"] for name, value in cells["adapter"].items()]
    tables = (
        table(["ms by batch size", *header], milliseconds),
        table(["images/s by batch size", *header], rates),
        table(["adapter file to image", "ms"], adapter),
    )
    return "\n\n".join(tables)


def comfyui_overhead(server: str, adapter: str = "") -> dict[str, float]:
    """Median milliseconds of one-step prompts of the miniature in a running ComfyUI, each with another seed.

    server: URL without a trailing slash. adapter: a name that Load Echo Adapter lists; each prompt applies it with
    another strength, so that ComfyUI does not cache the node.
    Returns whole: from sending the prompt to the message of its success; node: from the start of One-Step Sample to the
    start of the next node; difference: ComfyUI's validation, queue and messages, the other nodes, and the image file.
    Raises RuntimeError with ComfyUI's message if a prompt fails.
    """
    import websocket

    client = uuid.uuid4().hex
    socket = websocket.create_connection(f"{server.replace('http', 'ws', 1)}/ws?clientId={client}", timeout=120)
    whole, node = [], []
    try:
        for i in range(WARM_UP + 3 * REPEATS):
            prompt = _comfyui_prompt(i, adapter)
            body = json.dumps({"prompt": prompt, "client_id": client}).encode()
            started = time.perf_counter()
            request = urllib.request.Request(f"{server}/prompt", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=120).close()
            node_started, finished = _wait_for_success(socket)
            if i >= WARM_UP:
                whole.append(finished - started)
                node.append(node_started["show"] - node_started["sample"])
    finally:
        socket.close()
    medians = {"whole": statistics.median(whole) * 1e3, "node": statistics.median(node) * 1e3}
    return {**medians, "difference": medians["whole"] - medians["node"]}


def _wait_for_success(socket: Any) -> tuple[dict[str, float], float]:
    """Read messages until the prompt succeeds. Returns the start of each node by its id, and the end, in seconds."""
    node_started: dict[str, float] = {}
    while True:
        message = socket.recv()
        received = time.perf_counter()
        if not isinstance(message, str):
            continue
        event = json.loads(message)
        if event["type"] == "executing" and event["data"].get("node"):
            node_started[event["data"]["node"]] = received
        if event["type"] == "execution_error":
            raise RuntimeError(event["data"]["exception_message"])
        if event["type"] == "execution_success":
            return node_started, received


def _comfyui_prompt(seed: int, adapter: str) -> dict[str, Any]:
    widgets = {"prompt": PROMPT, "seed": seed, "width": 64, "height": 64, "steps": "1", "batch_size": 1, "denoise": 1.0}
    links = {"model": ["models", 0], "clip": ["models", 2], "vae": ["models", 3]}
    adapter_node: dict[str, Any] = {}
    if adapter:
        bases = {"base_model": links["model"], "base_clip": links["clip"]}
        strengths = {"strength_model": 0.5 + seed / 100, "strength_token": 1.0}
        inputs = {**bases, "adapter_name": adapter, "role": "student", **strengths, "any_base": False}
        adapter_node = {"adapter": {"class_type": "LoadEchoAdapter", "inputs": inputs}}
        links |= {"model": ["adapter", 0], "clip": ["adapter", 1]}
    return {
        **adapter_node,
        "models": {"class_type": "LoadMiniature", "inputs": {"toy": "dotted-mug"}},
        "sample": {"class_type": "OneStepSample", "inputs": {**links, **widgets}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["sample", 0]}},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argument_parser("benchmarks.sample", __doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="batch sizes")
    parser.add_argument(
        "--comfyui", default="", help="URL of a running ComfyUI with this node pack; only its prompts are timed"
    )
    parser.add_argument("--adapter", default="", help="with --comfyui: an adapter of the miniature for each prompt")
    options = parser.parse_args(arguments)
    if options.comfyui:
        overhead = comfyui_overhead(options.comfyui.rstrip("/"), options.adapter)
        print(table(["prompt in ComfyUI", "ms"], [[name, f"{value:.1f}"] for name, value in overhead.items()]))
        return 0
    device = torch.device(options.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        figures = Figures(options.out, "sample", device, {"scale": options.scale})
        get_models = cache(lambda: RandomModels(options.scale, device))
        for count in options.batches:
            figures.cell(str(count), partial(measure, get_models, count, dtype))
        figures.cell("adapter", partial(time_to_first_image, get_models, dtype))
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {options.scale} scale, {dtype}, {figures.record['date']}")
    print(report(figures, options.batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
