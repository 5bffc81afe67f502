"""Fixtures for adapters.

family                        one tiny family for a whole file: applying adapters must leave it as it is
make_adapter(vectors, role)   random differences of keys and values, of clearly different sizes
"""

import pytest
import torch

from echodistill_core.adapter.file import Adapter, run_metadata
from echodistill_core.models.layout import unet_names
from echodistill_core.settings import TrainSettings, affecting_result


@pytest.fixture(scope="module")
def family(tiny_family):
    return tiny_family()


@pytest.fixture(scope="module")
def make_adapter(family):
    """make_adapter(vectors=1, role="student"): random differences of keys and values, of clearly different sizes."""

    def make(vectors=1, role="student"):
        chosen = TrainSettings(class_noun="dog", vectors=vectors)
        unet = (family.student if role == "student" else family.teacher).unet
        generator = torch.Generator().manual_seed(4)
        weights = {n: p for n, p in unet.state_dict().items() if ".attn2.to_k." in n or ".attn2.to_v." in n}
        names = unet_names(weights, family.architecture)
        return Adapter(
            token_embeddings=torch.randn(vectors, 32, generator=generator),
            deltas={names[n]: 0.1 * torch.randn(p.shape, generator=generator) for n, p in weights.items()},
            metadata=run_metadata(family, role, affecting_result(chosen), "distil", 3),
        )

    return make
