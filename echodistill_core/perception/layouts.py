"""The layouts of published image encoders, and identifying a network by tensor names and shapes.

transformers    vision_model.*, visual_projection.weight (CLIP); embeddings.*, encoder.layer.* (ViT, DINO v2)
OpenCLIP        visual.*, and beside it token_embedding.*, transformer.*, text_projection, for both towers
timm and Meta   patch_embed.*, blocks.*, norm.*: DINO and DINO v2 as timm and as Meta's own repositories name them

A file's header is enough. `conversion` renames all layouts to transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from transformers import CLIPConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

from .backbones import BackboneSpec

Shapes = Mapping[str, tuple[int, ...]]

TRANSFORMERS, OPEN_CLIP, TIMM = "transformers'", "OpenCLIP's", "timm's or Meta's"
# The patch embedding identifies the layout; the name's start is the prefix of the whole network.
_ANCHORS = {
    "vision_model.embeddings.patch_embedding.weight": TRANSFORMERS,
    "embeddings.patch_embeddings.projection.weight": TRANSFORMERS,
    "visual.conv1.weight": OPEN_CLIP,
    "patch_embed.proj.weight": TIMM,
}
_CLIP_ANCHORS = ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight")
_LAYER = re.compile(r"^(?:vision_model\.|visual\.)?(?:encoder\.|transformer\.)?(?:layers?|resblocks|blocks)\.(\d+)\.")
_TEXT_LAYER = re.compile(r"^(?:text_model\.encoder\.layers|(?:text\.)?transformer\.resblocks)\.(\d+)\.")
# Meta's training code groups blocks for FSDP: blocks.GROUP.BLOCK.
_GROUPED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")
# Networks with similar tensors and another forward pass: kind, and the tensor that shows it.
_OTHER_KINDS = (
    ("DINO v2 with registers", re.compile(r"^(embeddings\.)?(register_tokens|reg_token|storage_tokens)$")),
    ("ViT with a distillation token", re.compile(r"^(embeddings\.)?(dist_token|distillation_token)$")),
    ("ViT with a classifier", re.compile(r"^head\.weight$")),  # timm's; DINO has no classifier
    ("CLIP with attention pooling", re.compile(r"^visual\.attn_pool\.")),
)
_TOKENS = (
    "text_model.embeddings.token_embedding.weight",
    "token_embedding.weight",
    "text.token_embedding.weight",  # OpenCLIP's CustomTextCLIP
)
_POSITIONS = (
    "vision_model.embeddings.position_embedding.weight",
    "embeddings.position_embeddings",
    "visual.positional_embedding",
    "pos_embed",
)
_MLP = (
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.mlp.fc1.weight",
    "layers.0.mlp.fc1.weight",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "blocks.0.mlp.fc1.weight",
)
_SEVERAL = "file of several networks"
_TITLES = {
    "ViT": "{}",
    "DINO v2 with registers": "DINO v2 {} with registers",
    "ViT with a distillation token": "{} with a distillation token",
    "ViT with a classifier": "{} with a classifier",
    "CLIP with attention pooling": "CLIP {} with attention pooling",
}
_SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1536: "g", 1664: "bigG"}


@dataclass(frozen=True)
class Network:
    """Properties of an image encoder that follow from tensor names and shapes.

    layout: TRANSFORMERS, OPEN_CLIP or TIMM. kind: such as "CLIP", "DINO v2", "ViT".
    width, depth, mlp: of its transformer. patch: side in pixels. positions: rows of the position embeddings.
    projection: width of the image embedding, 0 without one. text: width and depth of the file's text encoder.
    prefix: common prefix of all names.
    """

    layout: str
    kind: str
    width: int
    depth: int
    mlp: int
    patch: int
    positions: int
    projection: int = 0
    text: tuple[int, int] = (0, 0)
    prefix: str = ""

    @property
    def title(self) -> str:
        """For messages, such as "CLIP ViT-H/14 at 224 pixels"."""
        grid = math.isqrt(max(self.positions - 1, 0))
        side = f" at {grid * self.patch} pixels" if grid * grid + 1 == self.positions else ""
        name = f"ViT-{_SIZES.get(self.width, self.width)}/{self.patch}"
        if self.kind.startswith(_SEVERAL):
            return f"{self.kind}, the first {name}{side}"
        return _TITLES.get(self.kind, f"{self.kind} {{}}").format(name) + side


def network_of(shapes: Shapes) -> Network | None:
    """The image encoder with tensors of these shapes; None for an unknown layout."""
    found = [
        (name.removesuffix(anchor), anchor)
        for anchor in _ANCHORS
        for name in shapes
        if name == anchor or name.endswith(f".{anchor}")
    ]
    # DINO's authors publish and evaluate the teacher of self-distillation.
    teachers = [(prefix, anchor) for prefix, anchor in found if prefix.startswith("teacher.")]
    found = teachers if len(found) > 1 and teachers else found
    if not found:
        return None
    prefix, anchor = found[0]
    own = {normalised_name(n, prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
    patch = own[anchor]
    if len(patch) != 4:
        return None
    layout = _ANCHORS[anchor]
    clip = anchor in _CLIP_ANCHORS
    positions, text = _first(own, *_POSITIONS), _first(own, *_TOKENS)
    return Network(
        layout=layout,
        kind=_kind(own, clip) if len(found) == 1 else f"{_SEVERAL} ({', '.join(p or anchor for p, _ in found)})",
        width=patch[0],
        depth=_depth(own, _LAYER),
        mlp=_first(own, *_MLP)[0],
        patch=patch[-1],
        positions=positions[-2] if len(positions) > 1 else 0,
        projection=(_first(own, "visual_projection.weight")[0] or _first(own, "visual.proj")[-1]) if clip else 0,
        text=(text[-1], _depth(own, _TEXT_LAYER)) if text[-1] else (0, 0),
        prefix=prefix,
    )


def network_expected(spec: BackboneSpec) -> Network | None:
    """The network that a backbone's specification describes; None for other configurations than ViT, DINO v2, CLIP."""
    config = spec.config
    both = isinstance(config, CLIPConfig)
    vision = config.vision_config if both else config
    if not isinstance(vision, (ViTConfig, Dinov2Config, CLIPVisionConfig)):
        return None
    dinov2 = isinstance(vision, Dinov2Config)
    clip = both or isinstance(vision, CLIPVisionConfig)
    return Network(
        layout=TRANSFORMERS,
        kind="CLIP" if clip else "DINO v2" if dinov2 else "ViT",
        width=vision.hidden_size,
        depth=vision.num_hidden_layers,
        mlp=int(vision.hidden_size * vision.mlp_ratio) if dinov2 else vision.intermediate_size,
        patch=vision.patch_size,
        positions=(vision.image_size // vision.patch_size) ** 2 + 1,
        projection=config.projection_dim if clip else 0,
        text=(config.text_config.hidden_size, config.text_config.num_hidden_layers) if both else (0, 0),
    )


def network_mismatch(found: Network, spec: BackboneSpec) -> str:
    """The differences from a backbone's network, for messages; "" where they are equal.

    For example "OpenCLIP's CLIP ViT-L/14 at 224 pixels, expected CLIP ViT-H/14 ...: width 1024 instead of 1280".
    """
    expected = network_expected(spec)
    assert expected is not None
    compared = [f.name for f in fields(Network) if f.name not in ("layout", "prefix")]
    # A text encoder in the file is ignored where the backbone has none.
    compared = [name for name in compared if name != "text" or any(expected.text)]
    different = [_difference(n, found, expected) for n in compared if getattr(found, n) != getattr(expected, n)]
    if not different:
        return ""
    return f"{found.layout} {found.title}, expected {spec.title} ({expected.title}): {', '.join(different)}"


def _difference(name: str, found: Network, expected: Network) -> str:
    have, want = getattr(found, name), getattr(expected, name)
    if name == "text" and not any(have):
        return "no text encoder beside it"
    words = {
        "mlp": "MLP width",
        "patch": "patch side",
        "positions": "number of position embeddings",
        "projection": "width of the image embedding",
        "text": "width and depth of the text encoder",
    }
    return f"{words.get(name, name)} {have} instead of {want}"


def _kind(own: Shapes, clip: bool) -> str:
    for kind, pattern in _OTHER_KINDS:
        if any(pattern.match(name) for name in own):
            return kind
    if clip:
        has_token = "vision_model.embeddings.class_embedding" in own or "visual.class_embedding" in own
        return "CLIP" if has_token else "SigLIP"
    scaled = any(name.endswith((".layer_scale1.lambda1", ".ls1.gamma")) for name in own)
    return "DINO v2" if scaled else "ViT"


def _depth(own: Shapes, pattern: re.Pattern[str]) -> int:
    return len({match[1] for name in own if (match := pattern.match(name))})


def _first(own: Shapes, *names: str) -> tuple[int, ...]:
    """The first non-empty shape among these tensors; (0,) where all are absent."""
    return next((own[name] for name in names if own.get(name)), (0,))


def normalised_name(name: str, prefix: str) -> str:
    """A tensor's name without `prefix` and without Meta's groups of blocks."""
    return _GROUPED_BLOCK.sub(r"blocks.\1.", name.removeprefix(prefix))
