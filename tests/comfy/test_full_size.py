"""Checkpoints with the shapes of SD-Turbo and SD 2.1 and random weights: 12 GB of disk and of memory, some minutes.

ECHODISTILL_FULL_SIZE=1 sh tests/comfy/run 0.33.0 -k full_size
"""

from __future__ import annotations

import os

import graphs
import pytest
import torch
from comfy_server import Server
from PIL import Image

from benchmarks import random_checkpoint as rc
from benchmarks.architecture_jobs import adapt_and_sample
from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.evaluation.metrics import PROTOCOLS
from echodistill_core.evaluation.pictures import score_pictures
from echodistill_core.models.architectures import SD2
from echodistill_core.models.load import load_family
from echodistill_core.perception.backbones import SPECS
from echodistill_core.perception.load import BackboneFiles
from echodistill_core.sampling import denoise
from echodistill_core.tensorfile import write_tensors

pytestmark = pytest.mark.skipif(
    not os.environ.get("ECHODISTILL_FULL_SIZE"), reason="ECHODISTILL_FULL_SIZE is not set: it takes 12 GB"
)
TITLES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
PROMPT = "photo of a <new1> dog on the beach"


@pytest.fixture(scope="module")
def full(tmp_path_factory, comfyui):
    """ComfyUI's folders with both checkpoints, an adapter for all keys and values, and the backbones."""
    base = tmp_path_factory.mktemp("full")
    models = base / "models"
    for role in rc.ROLES:
        networks = rc.random_checkpoint(role, SD2, torch.float16)
        rc.write_file(models / "checkpoints" / f"{role}.safetensors", role, networks, SD2)
        del networks
    (models / "loras").mkdir(parents=True)
    adapt_and_sample(str(models / "checkpoints" / "student.safetensors"), str(models / "loras" / "full.safetensors"))
    # In the usual folders; CLIP ViT-H under the file name that IP-Adapter uses.
    backbone_files = {
        "dino": "echodistill/dino",
        "dinov2-small": "echodistill/dinov2-small",
        "clip-vit-b-32": "echodistill/clip-vit-b-32",
        "clip": "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }
    for seed, (name, path) in enumerate(backbone_files.items()):
        spec = SPECS[name]
        with torch.device("meta"):
            empty = spec.build(spec.config)
        tensors = rc.random_tensors(empty.state_dict(), seed, torch.float16)
        write_tensors(models / f"{path}.safetensors", tensors, {})
    projector = SPECS["clip"].projector
    assert projector is not None
    width = projector["cross_attention_dim"]
    shapes = {
        "image_proj.proj.weight": torch.empty(4 * width, projector["image_embed_dim"]),
        "image_proj.proj.bias": torch.empty(4 * width),
        "image_proj.norm.weight": torch.empty(width),
        "image_proj.norm.bias": torch.empty(width),
    }
    path = models / "ipadapter" / "ip-adapter_sd15.safetensors"
    write_tensors(path, rc.random_tensors(shapes, 9, torch.float16), {})
    (base / "input" / "dog").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((96, 96), 60 + i).convert("RGB").save(base / "input" / "dog" / f"{i}.png")
    return base


@pytest.fixture
def serve(full, comfyui):
    """Starts a server on these models; one at a time, because of their memory."""
    started = []

    def start(*flags):
        started.append(Server(comfyui, full, full / "server.log").start(*flags))
        return started[0]

    yield start
    started[0].kill()


def loader(role):
    return graphs.node("CheckpointLoaderSimple", ckpt_name=f"{role}.safetensors")


def test_load_checkpoint_adapter_and_sampling_equal_the_core(full, serve):
    """Both in float32. One-step sampling multiplies the UNet's rounding error by 1 / sqrt(abar) = 15, hence 1e-5.

    On a GPU ComfyUI computes in half precision, whose rounding alone would be a hundred times that.
    """
    server = serve()
    info = server.get("object_info")
    graph = {
        "student": loader("student"),
        "adapter": graphs.load_adapter(info, ["student", 0], ["student", 1], adapter_name="full.safetensors"),
        "sample": graphs.one_step(info, ["adapter", 0], ["adapter", 1], ["student", 2], PROMPT, seed=6),
        "keep": graphs.node("SaveLatent", samples=["sample", 1], filename_prefix="full"),
    }
    outcome = server.run(graph)
    assert not outcome.error
    found = graphs.saved_latent(full, "full")

    family = load_family(full / "models" / "checkpoints" / "student.safetensors").to("cpu", torch.float32)
    noise = torch.randn([1, 4, 8, 8], generator=torch.Generator().manual_seed(6))
    adapter = read_adapter(full / "models" / "loras" / "full.safetensors")
    with torch.no_grad(), personalised(family, [adapter]) as model:
        expected = denoise(model.denoiser, noise, model.condition([PROMPT]), 1) / 0.18215
        plain = denoise(model.denoiser, noise, family.text(["photo of a cat"]), 1) / 0.18215
    error, effect = (float((x - expected).norm() / expected.norm()) for x in (found, plain))
    print(f"relative error {error:.2e}; another prompt changes {effect:.2e}")
    assert error < 1e-5
    assert effect > 1e-2


def test_one_iteration_of_training_at_64_pixels(full, serve):
    """With UNets in bf16, so that ComfyUI's models and the trained copies fit into 24 GB."""
    server = serve("--bf16-unet")
    info = server.get("object_info")
    graph = graphs.training(
        info,
        "dog",
        "dog",
        iterations=1,
        preview_every=1,
        resolution=64,
        precision="bf16",
        memory_mode="low",
        dinov2_backbone="dinov2-small",
        batch_size=1,
    )
    graph.pop("models")
    graph |= {"student": loader("student"), "teacher": loader("teacher")}
    graph["concept"]["inputs"]["folder"] = "dog"
    graph["train"]["inputs"] |= {
        "student": ["student", 0],
        "teacher": ["teacher", 0],
        "clip": ["teacher", 1],
        "vae": ["student", 2],
    }
    outcome = server.run(graph)
    assert not outcome.error
    (run,) = (full / "output" / "echodistill").iterdir()
    adapter = read_adapter(run / "distil" / "student.safetensors")
    assert len(adapter.deltas) == 32
    assert all(bool(delta.isfinite().all()) for delta in adapter.deltas.values())
    assert any(float(delta.abs().max()) > 0 for delta in adapter.deltas.values())
    print(f"the server's memory after it: {server.memory() / 1e9:.1f} GB")


def test_scores_by_dreambooths_protocol_are_the_cores(full, serve):
    """And by the authors' own, whose encoders are not there, says which are missing."""
    server = serve()
    info = server.get("object_info")

    def scored(protocol):
        return {
            "concept": graphs.concept(info, "dog", "dog"),
            "image": graphs.node("EmptyImage", width=96, height=96, batch_size=2, color=0x4080C0),
            "score": graphs.node(
                "ScoreEcho",
                images=["image", 0],
                concept=["concept", 0],
                prompt="photo of a <new1> dog on the beach",
                protocol=protocol,
            ),
        }

    outcome = server.run(scored("dreambooth"))
    assert not outcome.error
    assert "backbones are missing" in server.run(scored("authors")).error
    names = {"clip-vit-b-32", "dino"}
    images = torch.tensor([0x40, 0x80, 0xC0]).reshape(1, 3, 1, 1).expand(2, 3, 96, 96) / 127.5 - 1
    expected = score_pictures(
        images,
        load_photographs(full / "input" / "dog"),
        "photo of a <new1> dog on the beach",
        "<new1>",
        PROTOCOLS["dreambooth"],
        {name: BackboneFiles(full / "models" / "echodistill" / f"{name}.safetensors") for name in names},
    )
    text = "\n".join(outcome.outputs["score"]["text"])
    assert text.splitlines() == [f"{title} {expected[name]:.3f}" for name, title in TITLES.items()]
