"""Parts of nodes/bridge in this process, with ComfyUI's modules but no server, for cases that a server cannot reach."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from echodistill_core.perception.backbones import SPECS


class Patcher:
    """A ModelPatcher as far as names and shapes go."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.model = torch.nn.Module()
        self.patches: dict[str, object] = {}
        self.patches_uuid = 0
        self.shapes = shapes

    def get_key_patches(self, prefix):
        tensors = {f"diffusion_model.{n}": torch.empty(s, device="meta") for n, s in self.shapes.items()}
        return {name: [(tensor, None)] for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (1280, 2816)}, "an SDXL UNet"),
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux transformer"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "an SD 3 transformer"),
    ],
)
def test_a_model_of_another_family_is_refused_and_named(bridge, shapes, kind):
    with pytest.raises(ValueError, match=f"it looks like {kind}"):
        bridge("kinds").architecture_of(Patcher(shapes))


def test_a_clip_of_another_family_is_refused_and_named(bridge):
    clip = SimpleNamespace(cond_stage_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the CLIP is a Linear; expected"):
        bridge("weights").clip_name(clip)


@pytest.mark.parametrize("missing", ["student", "teacher", "clip", "vae"])
def test_a_part_that_is_missing_is_named(bridge, missing):
    parts = {
        "student": Patcher({}),
        "teacher": Patcher({}),
        "clip": object(),
        "vae": SimpleNamespace(first_stage_model=1),
    }
    models = bridge("sockets").Models(**{**parts, missing: None})
    with pytest.raises(ValueError, match=rf"(?i)the {missing} is missing"):
        bridge("kinds").sources_of(models)


@pytest.mark.parametrize("name", ["SD2", "MINIATURE"])
def test_a_clip_of_another_width_is_refused_before_anything_is_copied(bridge, core, monkeypatch, name):
    """The miniature's own CLIP, 48 wide, with UNets of SD 2.x, which read 1024, and with its own."""
    kinds = bridge("kinds")
    architecture = getattr(core("models.architectures"), name)
    monkeypatch.setattr(kinds, "architecture_of", lambda model: architecture)
    models = bridge("sockets").Models(*bridge("miniature").load_miniature(None))
    if name == "MINIATURE":
        assert kinds.sources_of(models).family == "miniature"
        return
    with pytest.raises(
        ValueError, match=r"the CLIP is 48 wide, but student and teacher \(SD 2.x\) read text 1024 wide"
    ):
        kinds.sources_of(models)


class CountingClip:
    """A CLIP that counts what it encodes."""

    def __init__(self) -> None:
        self.layer_idx = None
        self.encoded: list[str] = []

    def tokenize(self, prompt):
        return prompt

    def encode_from_tokens_scheduled(self, tokens):
        self.encoded.append(tokens)
        return [tokens]


def test_a_prompt_is_encoded_once_for_each_clip(bridge):
    encode, clip, other = bridge("sampling").encode, CountingClip(), CountingClip()
    assert [encode(clip, p) for p in ("a", "b", "a", "a")] == [["a"], ["b"], ["a"], ["a"]]
    assert encode(other, "a") == ["a"]
    assert (clip.encoded, other.encoded) == (["a", "b"], ["a"])


def test_only_the_latest_prompts_are_kept(bridge):
    encode, clip = bridge("sampling").encode, CountingClip()
    for prompt in [*"abcdefgh", "a", "i", "a", "b"]:
        encode(clip, prompt)
    # "a" was used again before "i", so "b" was dropped.
    assert clip.encoded == [*"abcdefghi", "b"]


@pytest.fixture
def folders(bridge, monkeypatch, tmp_path):
    """ComfyUI's folders of models, empty, and no hub cache."""
    module = bridge("backbones")
    kinds = {kind: tmp_path / kind for kind in ("echodistill", "clip_vision", "ipadapter")}
    for kind, folder in kinds.items():
        folder.mkdir()
        monkeypatch.setitem(module.folder_paths.folder_names_and_paths, kind, ([str(folder)], set()))
    monkeypatch.setattr(module, "cached_folder", lambda name: None)
    return kinds


def put(shapes: dict[str, tuple[int, ...]], *path: Path | str) -> Path:
    """A safetensors file in half precision whose data are a hole in the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    file = Path(*path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(file, 8 + len(raw) + end)
    return file


def published(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a backbone in transformers' layout."""
    with torch.device("meta"):
        encoder = SPECS[name].build(SPECS[name].config)
    return {n: tuple(t.shape) for n, t in encoder.state_dict().items()}


def by_timm(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in timm.create_model(name, pretrained=False).state_dict().items()}


PROJECTOR = {
    "image_proj.proj.weight": (4 * 768, 1024),
    "image_proj.proj.bias": (4 * 768,),
    "image_proj.norm.weight": (768,),
    "image_proj.norm.bias": (768,),
}


def test_backbones_are_found_where_comfyui_keeps_them(bridge, folders):
    clip = put(published("clip"), folders["clip_vision"], "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    put({"image_proj.latents": (1, 16, 768)}, folders["ipadapter"], "other", "ip-adapter_sd15.safetensors")
    projector = put(PROJECTOR, folders["ipadapter"], "sd15", "ip-adapter_sd15.safetensors")
    large = put(by_timm("vit_large_patch14_dinov2"), folders["clip_vision"], "vit_large_patch14_dinov2.safetensors")
    dino = put(published("dino"), folders["echodistill"], "dino.safetensors")
    put(published("dinov2-small"), folders["echodistill"], "dinov2-small", "model.safetensors")
    found = bridge("backbones").find_backbones(["clip", "dinov2", "dino", "dinov2-small"])
    assert (found["clip"].encoder, found["clip"].projector) == (clip, projector)
    assert (found["dinov2"].encoder, found["dino"].encoder) == (large, dino)
    assert found["dinov2-small"].encoder == folders["echodistill"] / "dinov2-small"


def test_a_folder_of_ones_own_may_leave_the_projector_to_the_ipadapter_folder(bridge, folders):
    put(published("clip"), folders["echodistill"], "clip", "model.safetensors")
    projector = put(PROJECTOR, folders["ipadapter"], "ip-adapter_sd15.safetensors")
    found = bridge("backbones").find_backbones(["clip"])["clip"]
    assert (found.encoder, found.projector) == (folders["echodistill"] / "clip", projector)
    own = put(PROJECTOR, folders["echodistill"], "clip", "ip-adapter_sd15.safetensors")
    assert bridge("backbones").find_backbones(["clip"])["clip"].projector == own


def test_a_wrong_file_by_the_right_name_does_not_hide_the_right_one(bridge, folders, monkeypatch):
    """The right file is in a later folder, later in the list, or in the hub cache."""
    files = bridge("backbones").BackboneFiles
    wrong = put(published("dinov2-small"), folders["echodistill"], "dino.safetensors")
    put(by_timm("vit_base_patch16_224.dino"), folders["clip_vision"], "dino-vits16.safetensors")
    message = bridge("backbones").search_backbones(["dino"])[1]
    assert f"{wrong} is transformers' DINO v2 ViT-S/14 at 518 pixels, expected DINO v1 ViT-S/16" in message
    assert "dino-vits16.safetensors is timm's or Meta's ViT-B/16 at 224 pixels, expected DINO v1" in message
    right = put(by_timm("vit_small_patch16_224.dino"), folders["clip_vision"], "zoo", "model.safetensors")
    assert bridge("backbones").search_backbones(["dino"]) == ({"dino": files(right)}, "")
    right.unlink()
    monkeypatch.setattr(bridge("backbones"), "cached_folder", lambda name: folders["ipadapter"])
    assert bridge("backbones").search_backbones(["dino"]) == ({"dino": files(folders["ipadapter"])}, "")


def test_all_backbones_that_are_missing_are_named_at_once(bridge, folders):
    put(published("clip"), folders["clip_vision"], "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")  # without a projector
    put({"vision_model.head.probe": (1, 1, 1152)}, folders["clip_vision"], "sigclip_vision_patch14_384.safetensors")
    with pytest.raises(ValueError, match="backbones are missing") as caught:
        bridge("backbones").find_backbones(["dino", "dinov2", "clip"])
    message = str(caught.value)
    for part in (
        "(dino, 0.1 GB",
        "(dinov2, 1.2 GB",
        "(clip, 2.5 GB",
        "download dino dinov2 clip",
        str(folders["ipadapter"]),
        "b79K.safetensors is there, but no ip-adapter_sd15.safetensors of IP-Adapter that fits it",
    ):
        assert part in message
    assert "sigclip" not in message
    assert "Nothing is downloaded unasked" in message


def settings_of(core, **options):
    return core("settings").TrainSettings(class_noun="dog", **options)


def test_too_little_memory_is_told_with_what_would_fit(bridge, core, monkeypatch):
    memory = bridge("memory")
    monkeypatch.setattr(memory.mm, "free_memory", lambda needed, device: None)
    monkeypatch.setattr(memory.mm, "get_free_memory", lambda device: 3 * memory.GB)
    with (
        pytest.raises(ValueError, match="not enough memory") as caught,
        memory.free_memory_for(12 * memory.GB, torch.device("cuda"), settings_of(core), 512),
    ):
        pass
    for part in ("12.0 GB for weights", "3.0 GB free", "memory_mode low", "precision bf16 halves that", "dinov2-small"):
        assert part in str(caught.value)


def test_memory_that_may_run_out_is_told_with_the_mode_that_takes_less(bridge, core, monkeypatch):
    """2 GB of weights plus 8.2 GB of activations (two images of 512 pixels in bf16) exceed the free memory."""
    memory, asked = bridge("memory"), []
    monkeypatch.setattr(memory.mm, "free_memory", lambda needed, device: asked.append(needed))
    monkeypatch.setattr(memory.mm, "get_free_memory", lambda device: 8 * memory.GB)
    cuda = torch.device("cuda")
    with memory.free_memory_for(2 * memory.GB, cuda, settings_of(core, precision="bf16"), 512) as message:
        assert message.startswith("about 10.2 GB, of which 2.0 GB for weights and optimisers, 8.0 GB free on cuda")
        assert "memory_mode low takes less" in message
    low = settings_of(core, precision="bf16", memory_mode="low")
    with memory.free_memory_for(2 * memory.GB, cuda, low, 512) as message:
        assert message == "about 2.8 GB, of which 2.0 GB for weights and optimisers, 8.0 GB free on cuda"
    with memory.free_memory_for(2 * memory.GB, cuda, low, 256) as message:
        assert message.startswith("about 2.2 GB")
    assert [round(n / memory.GB, 1) for n in asked] == [10.2, 2.8, 2.2]


def test_the_least_of_memory_is_weights_and_optimisers(bridge, core, tmp_path):
    memory, load = bridge("memory"), core("perception.load")
    (tmp_path / "a.safetensors").write_bytes(b"1234" * 10)
    files = load.BackboneFiles(tmp_path / "a.safetensors")
    model = SimpleNamespace(model=torch.nn.Linear(9, 10))  # 100 numbers in float32
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    halves, whole = settings_of(core, precision="bf16"), settings_of(core)
    assert memory.least_bytes([model], 5, [files], whole, gpu) == 400 + 40 + 5 * 16
    assert memory.least_bytes([model], 5, [files], halves, gpu) == 200 + 20 + 5 * 16
    low = settings_of(core, precision="bf16", memory_mode="low")
    assert memory.least_bytes([model, model], 5, [files], halves, gpu) == 2 * 200 + 20 + 5 * 16
    assert memory.least_bytes([model, model], 5, [files], low, gpu) == 200 + 20 + 5 * 16  # one UNet at a time
    assert memory.least_bytes([model, model], 5, [files], low, cpu) == 2 * 400 + 2 * 200 + 20 + 5 * 16
    # On a CPU the copies of the weights and the casts made from them are in the same memory, unless they are equal.
    assert memory.least_bytes([model], 5, [files], whole, cpu) == 400 + 40 + 5 * 16
    assert memory.least_bytes([model], 5, [files], halves, cpu) == 400 + 200 + 20 + 5 * 16


def test_out_of_memory_is_passed_on_with_a_word_on_the_node(bridge, core, monkeypatch):
    """ComfyUI frees all models when it sees the error, and the queue continues."""
    training = bridge("training")
    said = []
    monkeypatch.setattr(training, "least_bytes", lambda *arguments: 0)
    monkeypatch.setattr(training, "_trainable", lambda *arguments: 0)
    monkeypatch.setattr(training, "build_family", lambda models: (None, []))
    monkeypatch.setattr(training, "set_status", lambda node, text: said.append(text))
    models = SimpleNamespace(
        student=None, teacher=None, clip=SimpleNamespace(patcher=None), vae=SimpleNamespace(patcher=None)
    )
    with (
        pytest.raises(training.mm.OOM_EXCEPTION),
        training.family_on_device(models, settings_of(core), 512, None, "1"),
    ):
        raise training.mm.OOM_EXCEPTION("out of memory, and what to do")
    assert said[-1] == "out of memory, and what to do"


def test_two_models_alike_are_not_taken_for_swapped(bridge):
    """The predictions of one of two similar models vary slightly more, by chance."""
    roles = bridge("roles")
    student, teacher, clip, vae = bridge("miniature").load_miniature(None)
    for model in (student, teacher):
        other = model.clone()
        key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        weight = model.model_state_dict()[key]
        for seed in range(3):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            other.add_patches({key: ("diff", (0.01 * noise,))})
            roles.check_roles(bridge("sockets").Models(model, other, clip, vae), stop=True)
    with pytest.raises(ValueError, match="seem to be swapped"):
        roles.check_roles(bridge("sockets").Models(teacher, student, clip, vae), stop=True)


def test_a_vae_with_infinite_weights_is_refused(bridge):
    """ComfyUI clips infinity to white, so the decoded picture does not show the error."""
    kinds = bridge("kinds")
    *_, vae = bridge("miniature").load_miniature(None)
    kinds.check_vae_finite(vae)
    *_, broken = bridge("miniature").load_miniature(None)
    broken.first_stage_model.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the VAE: .*decoder\.conv_out\.bias.*NaN or infinity"):
        kinds.check_vae_finite(broken)


def test_cancel_is_noticed_at_the_first_event_after_it(bridge, core, monkeypatch):
    """Counted in events, not seconds: a cancelled training stops at the end of its current iteration."""
    progress = bridge("progress")
    events = core("training.events")
    said, is_cancelled = [], []
    monkeypatch.setattr(progress, "set_status", lambda node, text, **_: said.append(text))
    monkeypatch.setattr(progress.ProgressBar, "update_absolute", lambda *arguments: None)

    def check():
        if is_cancelled:
            raise progress.mm.InterruptProcessingException

    monkeypatch.setattr(progress.mm, "throw_exception_if_processing_interrupted", check)
    listen = progress.NodeProgress("1", "distil", 40)
    for step in range(13, 17):
        listen(events.StepDone("distil", step, 40, {}))
    is_cancelled.append(True)
    with pytest.raises(progress.mm.InterruptProcessingException):
        listen(events.StepDone("distil", 17, 40, {}))
    assert said[0] == "distil: 13 of 40 (going on from 12)"
    assert said[-1] == "distil: cancelled at 17 of 40, kept: Run goes on from there"


def test_eight_bit_weights_with_scales_are_read_as_sampling_computes_with_them(bridge):
    """The layer's conversion function multiplies by the scale; the scale itself is not a weight."""
    weights = bridge("weights")
    full = torch.linspace(-3, 3, 64).view(8, 8)
    scale = torch.tensor(0.01)
    stored = (full / scale).to(torch.float8_e4m3fn)

    class Layer:
        """As comfy.ops' layers with scales."""

        def convert_weight(self, weight, inplace=False):
            return weight.mul_(scale) if inplace else weight * scale

    difference = torch.full((8, 8), 0.5)
    entries = {
        "diffusion_model.a.weight": [(stored, Layer().convert_weight)],
        "diffusion_model.a.scale_weight": [(scale, None)],
        "diffusion_model.b.weight": [(stored, Layer().convert_weight), (1.0, ("diff", (difference,)), 1.0, None, None)],
        "diffusion_model.c.weight": [(full, None)],
        "diffusion_model.scaled_fp8": [(torch.zeros(0), None)],
    }
    found = weights.network_tensors(
        SimpleNamespace(get_key_patches=lambda prefix: entries), weights.UNET_PREFIX
    ).tensors
    expected = (stored.float() * scale).half()
    assert set(found) == {"a.weight", "b.weight", "c.weight"}
    assert torch.equal(found["a.weight"], expected)
    assert torch.allclose(found["b.weight"].float(), expected.float() + difference, atol=2e-3)
    assert torch.equal(found["c.weight"], full)


def test_the_family_of_connected_models_is_named_by_what_they_are(bridge, core, monkeypatch):
    """Regression: SD 1.5 was recorded as sd-turbo, so sampling chose SD-Turbo and refused the adapter."""
    kinds = bridge("kinds")
    known = core("models.architectures")
    monkeypatch.setattr(kinds, "check_vae", lambda *arguments: None)
    for architecture, predicts, family in (
        (known.SD1, "epsilon", "custom"),
        (known.SD2, "v_prediction", "sd-turbo"),
        (known.SD2, "epsilon", "sd-turbo-base"),
    ):
        monkeypatch.setattr(kinds, "architecture_of", lambda model, found=architecture: found)
        monkeypatch.setattr(kinds, "prediction_of", lambda model, socket, found=predicts: found)
        monkeypatch.setattr(kinds, "embedding_table", lambda clip, width=architecture.text_width: torch.zeros(1, width))
        part = SimpleNamespace(first_stage_model=1, patcher=1)
        assert kinds.sources_of(bridge("sockets").Models(part, part, part, part)).family == family


def test_settings_left_alone_are_not_chosen(bridge):
    values = {
        "augment": "auto",
        "flip": "off",
        "teacher_lr": -1,
        "swd_weight": 0.0,
        "lora_rank": 4,
        "lr_decay": "cosine",
    }
    assert bridge("widgets").chosen(values) == {"flip": False, "swd_weight": 0.0, "lora_rank": 4, "lr_decay": "cosine"}
