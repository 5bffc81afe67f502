"""Sources that loading refuses, with clear messages."""

import json

import pytest
import torch
from checkpoints import refused
from published_models import save_folder
from safetensors.torch import save_file

from echodistill_core.models.architectures import looks_like


def test_a_missing_path_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(tmp_path / "nowhere")


def test_a_folder_without_a_unet_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    assert "no subfolder unet" in refused(tmp_path)


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_a_folder_with_a_missing_or_broken_configuration_is_refused(tmp_path, models, part):
    save_folder(tmp_path, models)
    for text, expected in (("{", "cannot be read as JSON"), ("[]", "no JSON object"), (None, "is missing")):
        (tmp_path / part).unlink() if text is None else (tmp_path / part).write_text(text)
        message = refused(tmp_path)
        assert str(tmp_path / part) in message
        assert expected in message


def test_a_folder_with_pickles_only_is_refused(tmp_path, models):
    save_folder(tmp_path, models)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refused(tmp_path)
    assert "pickle (diffusion_pytorch_model.bin)" in message
    assert "convert" in message
    weights.with_suffix(".bin").unlink()
    assert "holds no .safetensors weights" in refused(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_a_broken_index_of_shards_is_refused(tmp_path, models, index):
    save_folder(tmp_path, models)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    message = refused(tmp_path)
    assert "weight_map" in message or "absent.safetensors does not exist" in message


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, models, parts):
    save_folder(tmp_path / "model", models)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(parts["unet"], "../../outside.safetensors")}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    assert "unet/outside.safetensors does not exist" in refused(tmp_path / "model")


def test_a_truncated_file_is_refused(tmp_path, file):
    whole = file.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in refused(path)


def test_a_pickle_is_refused_unopened(tmp_path, parts):
    path = tmp_path / "model.ckpt"
    torch.save(parts, path)
    message = refused(path)
    assert "pickle" in message
    assert "convert" in message


def test_missing_superfluous_and_misshapen_tensors_are_named(parts):
    for part, module in (("unet", "UNet"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        name = list(parts[part])[-2]
        message = refused({**parts, part: {n: t for n, t in parts[part].items() if n != name}})
        assert f"1 tensors are missing (the first is {name})" in message
        assert message.startswith(module)
        message = refused({**parts, part: {**parts[part], name: torch.zeros(3, 5)}})
        assert f"tensor {name} has shape (3, 5); expected {tuple(parts[part][name].shape)}" in message
    message = refused({**parts, "unet": {**parts["unet"], "add.weight": torch.zeros(1)}})
    assert "(the first is add.weight)" in message


def test_a_checkpoint_without_text_encoder_or_vae_is_refused(parts):
    for part in ("text_encoder", "vae"):
        lacking = {n: t for n, t in parts.items() if n != part}
        assert f"student holds no {part}" in refused(lacking)
        assert f"holds no {part}" in refused(lacking, lacking)


FOREIGN = {
    "SDXL file": (
        {
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        },
        "an SDXL checkpoint",
    ),
    "SDXL UNet": (
        {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        },
        "an SDXL UNet",
    ),
    "Flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux transformer"),
    "bare Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux transformer"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "an SD 3 transformer"),
    "ControlNet": (
        {
            "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
            "control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        },
        "a ControlNet",
    ),
    "diffusers ControlNet": (
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "conv_in.weight": (320, 4, 3, 3),
            "down_blocks.0.attentions.0.proj_in.weight": (320, 320),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "a ControlNet",
    ),
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 320)}, "a LoRA"),
    "diffusers LoRA": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 320)}, "a LoRA"),
    "VAE": ({"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE alone"),
    "UNet alone": (
        {
            "conv_in.weight": (320, 4, 3, 3),
            "down_blocks.0.attentions.0.proj_in.weight": (320, 320),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "a UNet of width 320 with text features of width 1024 and 4 input channels",
    ),
    "inpainting": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "an inpainting UNet (9 input channels)",
    ),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a text encoder alone"),
    "image encoder": ({"vision_model.embeddings.class_embedding": (1280,)}, "a CLIP image encoder"),
    "anything": ({"some.weight": (2, 2)}, "no model known here (1 tensors, the first named 'some.weight')"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_by_what_it_looks_like(tmp_path, kind):
    shapes, expected = FOREIGN[kind]
    path = tmp_path / "foreign.safetensors"
    save_file({n: torch.zeros(1, dtype=torch.uint8).expand(s).contiguous() for n, s in shapes.items()}, path)
    message = refused(path)
    assert str(path) in message
    assert f"looks like {expected};" in message


def test_given_foreign_tensors_are_refused_too(parts):
    controlnet = {**parts["unet"], "controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}
    assert "looks like a ControlNet" in refused({**parts, "unet": controlnet})
    assert "looks like an empty file" in refused({})
    assert looks_like({"down_blocks.0.attn2.to_k.diff": (2, 2)}) == "an EchoDistill adapter"


def test_a_folder_of_sdxl_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "in_channels": 4}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file({"add_embedding.linear_1.weight": torch.zeros(2, 2)}, tmp_path / "unet" / "model.safetensors")
    assert "looks like an SDXL UNet" in refused(tmp_path)
