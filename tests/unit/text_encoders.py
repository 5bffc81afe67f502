"""A small CLIP text encoder with CLIP's vocabulary, and token ids."""

import json

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from echodistill_core.models.text import (
    clip_tokenizer,
)

START, END, VOCABULARY, LENGTH = 49406, 49407, 49408, 77
# From CLIP's published vocabulary.
PHOTO, OF, A, DOG, COMMA, STOP = 1125, 539, 320, 1929, 267, 269

PROMPTS = [
    "",
    "a photo of a dog",
    "A DOG'S life: isn't it?!",
    "wow!",
    "!!! a ! b?! (really!)",
    "don't can't we've I'm you'll he'd",
    "café naïve Zürich, Ünïcode É",
    "e\u0301 combining accents",
    "Привет, мир",
    "日本語の写真",
    "مرحبا",
    "emoji 😀 dog 🏳️‍🌈",
    "  hello   world\n\ttabs ",
    "3.14 and 2,718 = 42%",
    "x-ray_vision/under\\slash #hashtag @name $5 ^_^",
    "(masterpiece:1.3), [blurry], {best|worst} <lora:x:1>",
    "photo of a <new1> dog",
    "½ ² ① straße İstanbul",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "word " * 100,
]


def tiny_model(width=16, vocabulary=VOCABULARY):
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        bos_token_id=START,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return CLIPTextModel(config).eval().requires_grad_(False)


def rows(count, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(8))


def padded(*ids, pad=0):
    return [START, *ids, END, *[pad] * (LENGTH - 2 - len(ids))]


def published_folder(folder, pad):
    """A tokenizer folder as the checkpoints of 2022 have it: vocabulary and merges, and the special tokens apart."""
    source = clip_tokenizer(True)
    model = json.loads(source.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    def added(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    ends = {"bos_token": added("<|startoftext|>"), "eos_token": added("<|endoftext|>")}
    ends["unk_token"] = added("<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({**ends, "pad_token": pad}))
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
