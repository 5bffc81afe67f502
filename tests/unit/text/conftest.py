"""Fixtures for text encoders."""

import pytest
from text_encoders import tiny_model

from echodistill_core.models.text import (
    TextEncoder,
    clip_tokenizer,
)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(tiny_model(), clip_tokenizer(pad_with_end=False))
