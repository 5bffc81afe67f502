"""Names of tensors in both layouts, against the converters that diffusers itself uses on single files."""

from dataclasses import replace

import pytest
import torch
from checkpoints import single_file
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from tensor_files import assert_same
from transformers import CLIPTextConfig, CLIPTextModel

from echodistill_core.models import layout
from echodistill_core.models.architectures import SD1, SD2, TINY, match, shapes_of
from echodistill_core.models.checkpoint import read_checkpoint
from echodistill_core.tensorfile import read_tensors, write_tensors

ARCHITECTURES = pytest.mark.parametrize("architecture", [SD2, SD1, TINY], ids=lambda a: a.name)
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def networks(architecture):
    """The three networks as their own libraries build them, without weights."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**architecture.unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**architecture.text_encoder)),
            "vae": AutoencoderKL(**architecture.vae),
        }


def tagged(architecture):
    """State dictionaries of full size whose every tensor is filled with a number of its own, in next to no memory."""
    parts, number = {}, 0
    for part, module in networks(architecture).items():
        parts[part] = {}
        for name, like in module.state_dict().items():
            parts[part][name.removeprefix("text_model.")] = torch.tensor(number, dtype=torch.int16).expand(like.shape)
            number += 1
    return parts


@ARCHITECTURES
def test_diffusers_own_converters_read_what_to_original_writes(architecture):
    parts = tagged(architecture)
    checkpoint = single_file(parts, architecture)
    assert_same(convert_ldm_unet_checkpoint(checkpoint, architecture.unet), parts["unet"])
    assert_same(convert_ldm_vae_checkpoint(checkpoint, architecture.vae), parts["vae"])
    if architecture is SD1:
        text = convert_ldm_clip_checkpoint(checkpoint)
    else:
        text = convert_open_clip_checkpoint(networks(architecture)["text_encoder"], checkpoint)
    assert_same({n.removeprefix("text_model."): t for n, t in text.items()}, parts["text_encoder"])


@ARCHITECTURES
def test_a_checkpoint_in_the_original_layout_is_recognised_and_read_back(architecture):
    parts = tagged(architecture)
    read = read_checkpoint(single_file(parts, architecture))
    assert read.architecture is architecture
    assert_same(read.unet, parts["unet"])
    assert_same(read.vae, parts["vae"])
    assert_same(read.text_encoder, parts["text_encoder"])


@ARCHITECTURES
def test_either_librarys_text_names_are_read_for_every_family(architecture):
    parts = tagged(architecture)
    for pad_with_end in (True, False):  # which decides the names that are written
        checkpoint = single_file(parts, replace(architecture, pad_with_end=pad_with_end))
        assert_same(read_checkpoint(checkpoint).text_encoder, parts["text_encoder"])


@ARCHITECTURES
def test_every_tensor_has_one_name_in_the_original_and_none_is_lost(architecture):
    parts = tagged(architecture)
    checkpoint = single_file(parts, architecture)
    assert sum(n.startswith(UNET) for n in checkpoint) == len(parts["unet"])
    assert sum(n.startswith(VAE) for n in checkpoint) == len(parts["vae"])
    fused = 0 if architecture is SD1 else 4 * architecture.text_encoder["num_hidden_layers"]  # q, k, v become one
    assert sum(n.startswith(TEXT) for n in checkpoint) == len(parts["text_encoder"]) - fused
    assert len(checkpoint) == sum(map(len, parts.values())) - fused


def test_true_architectures_have_the_published_numbers_of_tensors_and_weights():
    for architecture, unet, text in ((SD2, 865_910_724, 340_387_840), (SD1, 859_520_964, 123_060_480)):
        modules = networks(architecture)
        count = {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()}
        assert count == {"unet": unet, "text_encoder": text, "vae": 83_653_863}
        assert len(modules["unet"].state_dict()) == 686
        assert len(modules["vae"].state_dict()) == 248


# Names and shapes as they stand in the published files.
PUBLISHED = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.norm_out.weight": (128,),
}
PUBLISHED_SD2 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight": (320, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight": (1024, 4096),
    "cond_stage_model.model.ln_final.bias": (1024,),
}
PUBLISHED_SD1 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight": (320, 768),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}


@pytest.mark.parametrize(("architecture", "own"), [(SD2, PUBLISHED_SD2), (SD1, PUBLISHED_SD1)])
def test_published_tensor_names_are_produced(architecture, own):
    shapes = shapes_of(single_file(tagged(architecture), architecture))
    for name, shape in {**PUBLISHED, **own}.items():
        assert shapes.get(name) == shape, name


def test_a_tiny_checkpoint_survives_the_way_through_a_file_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(5)
    parts = {
        part: {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        for part, tensors in tagged(TINY).items()
    }
    write_tensors(tmp_path / "tiny.safetensors", single_file(parts, TINY), {})
    assert len(read_tensors(tmp_path / "tiny.safetensors")) == len(single_file(parts, TINY))
    read = read_checkpoint(tmp_path / "tiny.safetensors")
    assert_same(read.unet, parts["unet"])
    assert_same(read.vae, parts["vae"])
    assert_same(read.text_encoder, parts["text_encoder"])


def test_renaming_copies_no_unet_tensor_and_changes_none():
    parts = tagged(TINY)
    there = layout.unet_names(parts["unet"], TINY)
    checkpoint = single_file(parts, TINY)
    back = layout.from_original(checkpoint, there, UNET)
    for name, tensor in parts["unet"].items():
        assert checkpoint[UNET + there[name]] is tensor
        assert back[name] is tensor
    for name, tensor in single_file(parts, TINY).items():
        if name.startswith(VAE):  # 1x1 convolutions are views of the linear weights
            assert tensor.untyped_storage().data_ptr() in {
                t.untyped_storage().data_ptr() for t in parts["vae"].values()
            }


@ARCHITECTURES
def test_a_unet_in_diffusers_names_is_recognised_by_its_widths(architecture):
    assert match(shapes_of(networks(architecture)["unet"].state_dict()), "here") is architecture
