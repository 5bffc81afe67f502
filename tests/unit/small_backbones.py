"""Small backbones with random weights, in the form of the published folders, and their expected features."""

import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SIDE = 32
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": SIDE}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # as in the published folders
EXACT_SIZE = {"do_resize": False, "do_center_crop": False}
SMALL_CLIP = CLIPConfig(
    vision_config={**VIT, "intermediate_size": 64},
    text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    projection_dim=24,
)


def model_of(name):
    """A small model of the very class that the published folder of this name holds, every weight random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        if name == "dino":
            model = ViTModel(ViTConfig(**VIT, intermediate_size=64))  # published with its pooling layer
        elif name.startswith("dinov2"):
            model = Dinov2Model(Dinov2Config(**VIT))
        elif name == "clip":
            config = CLIPVisionConfig(**VIT, intermediate_size=64, projection_dim=32, hidden_act="gelu")
            model = CLIPVisionModelWithProjection(config)
        else:
            model = CLIPModel(SMALL_CLIP)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def projector_tensors(seed=6, embedding=32, width=16, tokens=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_proj.proj.weight": torch.randn(tokens * width, embedding, generator=generator),
        "image_proj.proj.bias": torch.randn(tokens * width, generator=generator),
        "image_proj.norm.weight": torch.randn(width, generator=generator),
        "image_proj.norm.bias": torch.randn(width, generator=generator),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4),  # the file's other half, which nobody here reads
    }


def save(folder, name):
    """A folder as the hub has it."""
    if name == "clip":
        model_of(name).save_pretrained(folder / "models" / "image_encoder")
        save_file(projector_tensors(), folder / "models" / "ip-adapter_sd15.safetensors")
    else:
        model_of(name).save_pretrained(folder)
    return folder


def pictures(side=SIDE, count=2):
    """PIL images and the same as (B, 3, H, W) in [-1, 1]."""
    values = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(2))
    return [to_pil_image(v.to(torch.uint8)) for v in values], values / 127.5 - 1


def processed(name, images):
    """The images as the published folder's own processor prepares them where they have the right size."""
    if name == "dino":
        processor = ViTImageProcessor(do_resize=False, **IMAGENET)
    elif name.startswith("dinov2"):
        processor = BitImageProcessor(**EXACT_SIZE, **IMAGENET)
    else:
        processor = CLIPImageProcessor(**EXACT_SIZE)  # its defaults are CLIP's mean and deviation
    return processor(images, return_tensors="pt").pixel_values


def expected_features(name, pixels):
    model = model_of(name)
    if name == "clip":
        t = projector_tensors()
        projected = model(pixels).image_embeds @ t["image_proj.proj.weight"].T + t["image_proj.proj.bias"]
        tokens = projected.reshape(len(pixels), 4, 16)
        mean = tokens.mean(-1, keepdim=True)
        deviation = (tokens.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return ((tokens - mean) / deviation * t["image_proj.norm.weight"] + t["image_proj.norm.bias"]).flatten(1)
    if name.startswith("clip-vit"):
        features = model.get_image_features(pixels)
        return features if isinstance(features, torch.Tensor) else features.pooler_output
    return model(pixels).last_hidden_state[:, 0]
