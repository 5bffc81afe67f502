"""The embedded family as ComfyUI's MODEL, CLIP and VAE objects, usable with stock nodes."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from ...echodistill_core.errors import InputError
from ...echodistill_core.models import layout
from ...echodistill_core.models.architectures import MINIATURE
from ...echodistill_core.models.checkpoint import Checkpoint, read_checkpoint
from ...echodistill_core.models.embedded import embedded_folder

UNET = MINIATURE.unet
TEXT = MINIATURE.text_encoder
VAE = MINIATURE.vae
WIDTH = UNET["block_out_channels"][0]
LAYERS = UNET["layers_per_block"]
# Transformer depth of each level, from the highest resolution on. Up blocks have one layer more than down blocks, and
# ComfyUI reads their list from the end.
_DOWN = [int("CrossAttn" in kind) for kind in UNET["down_block_types"]]
_UP = [int("CrossAttn" in kind) for kind in reversed(UNET["up_block_types"])]


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Stable Diffusion's latent format with the miniature's scale and channels."""

    scale_factor = VAE["scaling_factor"]
    latent_channels = VAE["latent_channels"]


class ModelConfig(comfy.supported_models_base.BASE):
    """Model configuration of the miniature, like that of Stable Diffusion 2."""

    unet_config: ClassVar[dict[str, Any]] = {}
    # The base class's own entry would force heads of 64.
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = LatentFormat
    memory_usage_factor = 1.0
    prediction = "epsilon"

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        """The prediction type as ComfyUI's ModelType."""
        types = comfy.model_base.ModelType
        return {"epsilon": types.EPS, "v_prediction": types.V_PREDICTION}[self.prediction]

    def inpaint_model(self) -> bool:
        """False; ComfyUI would take every UNet with more than 4 input channels for an inpainting model."""
        return False


class TextModel(comfy.sd1_clip.SDClipModel):
    """The CLIP text model, read at its last layer."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None, **_: Any
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            layer="last",
            textmodel_json_config={**TEXT, "eos_token_id": 49407, "max_position_embeddings": 77},
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            layer_norm_hidden_state=True,
            return_projected_pooled=True,
            model_options=model_options or {},
        )


class ClipModel(comfy.sd1_clip.SD1ClipModel):
    """Under the name that SD 2.x's text encoder has, so that embeddings are found by it."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None, **_: Any
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_name="h", clip_model=TextModel
        )


class WordTokenizer(comfy.sd1_clip.SDTokenizer):
    """CLIP's tokenizer, padded as SD 2.x does."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None, **_: Any) -> None:
        super().__init__(
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=TEXT["hidden_size"],
            embedding_key="clip_h",
            tokenizer_data=tokenizer_data or {},
        )


class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The same for ComfyUI's CLIP."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            clip_name="h",
            tokenizer=WordTokenizer,
        )


def load_miniature(embedding_directory: Any) -> tuple[Any, Any, Any, Any]:
    """Student MODEL, teacher MODEL, CLIP and VAE. Raises InputError where shipped files are missing or damaged."""
    student, teacher = (read_checkpoint(embedded_folder(role)) for role in ("student", "teacher"))
    return (
        load_model("student"),
        load_model("teacher"),
        _clip(teacher, embedding_directory),
        _vae(student),
    )


def load_model(role: str, disable_dynamic: bool = False) -> Any:
    """The MODEL of one role. disable_dynamic: newer ComfyUI versions set it when they rebuild a MODEL."""
    checkpoint = read_checkpoint(embedded_folder(role))
    config = ModelConfig(
        {
            "image_size": UNET["sample_size"],
            "in_channels": UNET["in_channels"],
            "out_channels": UNET["out_channels"],
            "model_channels": WIDTH,
            "num_res_blocks": [LAYERS] * len(_DOWN),
            "channel_mult": [width // WIDTH for width in UNET["block_out_channels"]],
            "transformer_depth": [depth for depth in _DOWN for _ in range(LAYERS)],
            "transformer_depth_output": [depth for depth in _UP for _ in range(LAYERS + 1)],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": UNET["use_linear_projection"],
            "context_dim": UNET["cross_attention_dim"],
            "num_heads": -1,
            "num_head_channels": WIDTH // UNET["attention_head_dim"][0],
            "legacy": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            "use_checkpoint": False,
            "dtype": torch.float32,
        }
    )
    config.prediction = checkpoint.schedule.prediction_type
    device = mm.get_torch_device()
    config.set_inference_dtype(
        torch.float32, mm.unet_manual_cast(torch.float32, device, config.supported_inference_dtypes)
    )
    names = layout.unet_names(checkpoint.unet, MINIATURE)
    tensors = {comfyui_name: checkpoint.unet[name] for name, comfyui_name in names.items()}
    model = config.get_model({}, "", device=mm.unet_offload_device())
    expected = model.diffusion_model.state_dict()
    if expected.keys() != tensors.keys():  # ComfyUI would only log this
        raise InputError(
            f"this ComfyUI builds the miniature's UNet differently ({len(expected)} tensors, the file has "
            f"{len(tensors)}); update ComfyUI or this pack."
        )
    model.load_model_weights(dict(tensors), "")
    patcher = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    result = patcher(model, load_device=device, offload_device=mm.unet_offload_device())
    # Newer ComfyUI versions rebuild a MODEL with this when they need a copy of its weights.
    result.cached_patcher_init = (load_model, (role,))
    return result


def _clip(checkpoint: Checkpoint, embedding_directory: Any) -> Any:
    tensors = {f"text_model.{name}": tensor for name, tensor in checkpoint.text_encoder.items()}
    # ComfyUI's text model has CLIP's projection, which Stable Diffusion does not use.
    tensors["text_projection.weight"] = torch.eye(TEXT["hidden_size"])
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(Tokenizer, ClipModel),
        embedding_directory=embedding_directory,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        # float32 on every device: the model is small, and the result then equals the core's.
        model_options={"dtype": torch.float32},
    )
    missing, unexpected = clip.load_sd(tensors)
    if missing or unexpected:
        raise InputError(
            f"this ComfyUI builds the miniature's text encoder differently (missing {missing}, unexpected "
            f"{unexpected}); update ComfyUI or this pack."
        )
    return clip


def _vae(checkpoint: Checkpoint) -> Any:
    widths = VAE["block_out_channels"]
    config = {
        "double_z": True,
        "z_channels": VAE["latent_channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": VAE["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(
        sd=dict(checkpoint.vae),
        config={"params": {"ddconfig": config, "embed_dim": VAE["latent_channels"]}},
        dtype=torch.float32,
    )
    vae.latent_channels = VAE["latent_channels"]
    return vae
