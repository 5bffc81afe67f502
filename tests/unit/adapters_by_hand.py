"""Adapters with random differences for the tiny family, and its weights and images."""

import torch

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import Adapter, run_metadata
from echodistill_core.sampling import sample
from echodistill_core.settings import TrainSettings, affecting_result

# Where the cross-attentions of the tiny family lie in the original layout. By hand: input block 0 is conv_in, and each
# level has one ResNet block and one downsampler; the output side has two blocks a level, the first level without
# attention.
TINY_BLOCKS = {
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "output_blocks.4.1": "up_blocks.2.attentions.0",
    "output_blocks.5.1": "up_blocks.2.attentions.1",
}
KV = {
    f"{there}.transformer_blocks.0.attn2.to_{x}.weight": f"{here}.transformer_blocks.0.attn2.to_{x}.weight"
    for there, here in TINY_BLOCKS.items()
    for x in "kv"
}
PLAIN, NAMED = "a photo of a dog", "a photo of a <new1> dog"


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metadata(family, **settings):
    chosen = TrainSettings(**{"class_noun": "dog", **settings})
    return run_metadata(family, "student", affecting_result(chosen), "distil", 3)


def make_adapter(family, seed=0, scale=0.1, **settings):
    """Random differences of all keys and values, and random rows."""
    weights = family.student.unet.state_dict()
    deltas = {o: drawn(*weights[d].shape, seed=seed + i, scale=scale) for i, (o, d) in enumerate(KV.items())}
    rows = drawn(settings.get("vectors", 1), 32, seed=seed + 99)
    return Adapter(token_embeddings=rows, deltas=deltas, metadata=metadata(family, **settings))


def weights_of(unet):
    return {n: p.detach().clone() for n, p in unet.named_parameters()}


def picture(family, adapters=(), strengths=(), prompt=PLAIN):
    with personalised(family, adapters, strengths) as model:
        return sample(model, [prompt], seed=5)
