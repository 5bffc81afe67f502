"""Fixtures for loading: one small checkpoint as networks, state dictionaries, diffusers folder and single file."""

import pytest
from published_models import networks, parts_of, save_folder, single_file
from safetensors.torch import save_file

from echodistill_core.models.architectures import TINY
from echodistill_core.models.text import clip_tokenizer


@pytest.fixture(scope="module")
def models():
    return networks(TINY, 1)


@pytest.fixture(scope="module")
def parts(models):
    return parts_of(models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    folder = save_folder(tmp_path_factory.mktemp("folder"), models)
    clip_tokenizer(pad_with_end=False).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    save_file(single_file(parts, TINY), path)
    return path
