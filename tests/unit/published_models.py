"""Small checkpoints as published ones are: all weights random, in every layout, with the usual unused tensors.

networks(architecture, seed)            the three networks from diffusers and transformers
parts_of(models) -> dict                their state dictionaries
single_file(parts, architecture)        the original layout, with unused tensors of published files
save_folder(folder, models, ...)        a diffusers folder
assert_holds(family, parts)             the family holds exactly these tensors
write_lora(path, alphas, rank)          a LoRA in kohya's names
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tensor_files import assert_same
from transformers import CLIPTextConfig, CLIPTextModel

from echodistill_core.models import layout
from echodistill_core.models.architectures import TINY

SMALL_SD1 = replace(
    TINY,
    name="small SD 1.x",
    unet={**TINY.unet, "cross_attention_dim": 24, "use_linear_projection": False, "attention_head_dim": 2},
    text_encoder={**TINY.text_encoder, "hidden_size": 24, "hidden_act": "quick_gelu", "projection_dim": 24},
    pad_with_end=True,
)
PROMPT = "photo of a dog"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def networks(architecture, seed):
    """The three networks from their own libraries, every weight random: a swapped scale or bias would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae = UNet2DConditionModel(**architecture.unet), AutoencoderKL(**architecture.vae)
        text = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
        for module in (unet, vae, text):
            for parameter in module.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            module.eval().requires_grad_(False)
    return SimpleNamespace(unet=unet, vae=vae, text_encoder=text)


def parts_of(models):
    return {name: {n: t.clone() for n, t in module.state_dict().items()} for name, module in vars(models).items()}


def single_file(parts, architecture):
    """What a published file holds: the three networks, and much that nobody here needs."""
    tensors = layout.to_original(parts["unet"], parts["text_encoder"], parts["vae"], architecture)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    tensors["betas"] = torch.linspace(0, 1, 1000)
    tensors["sqrt_alphas_cumprod"] = torch.zeros(1000)
    if architecture.pad_with_end:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        width = architecture.text_encoder["hidden_size"]
        last = f"cond_stage_model.model.transformer.resblocks.{architecture.text_encoder['num_hidden_layers']}."
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "ln_1.weight": (width,),
        }.items():
            tensors[last + name] = torch.ones(shape)
        tensors["cond_stage_model.model.text_projection"] = torch.eye(width)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    return tensors


def save_folder(folder, models, prediction="epsilon", **options):
    models.unet.save_pretrained(folder / "unet", **options)
    models.vae.save_pretrained(folder / "vae", **options)
    models.text_encoder.save_pretrained(folder / "text_encoder", **options)
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    ).save_pretrained(folder / "scheduler")
    return folder


def assert_holds(family, parts):
    """The family's student, VAE and text encoder hold exactly these tensors."""
    modules = {"unet": family.student.unet, "vae": family.vae, "text_encoder": family.text.model}
    for part, module in modules.items():
        assert_same(module.state_dict(), parts[part])


def write_lora(path, alphas, rank=4):
    """A LoRA in kohya's names, as Hyper-SD's: down, up, and alpha where it is a number."""
    tensors = {}
    for i, (name, alpha) in enumerate(alphas.items()):
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        out_features, in_features = {TO_K: (32, 32)}.get(name, (64, 64))
        tensors[f"{key}.lora_down.weight"] = noise(20 + i, rank, in_features)
        tensors[f"{key}.lora_up.weight"] = noise(40 + i, out_features, rank)
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path
