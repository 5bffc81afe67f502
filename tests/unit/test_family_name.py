"""What a run and its adapters record as the family of their models."""

from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint_parts, write_folder

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.models.architectures import MINIATURE, SD1, SD2, TINY
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import FAMILIES, ModelSources, family_name


@pytest.mark.parametrize(
    ("architecture", "teacher_predicts", "expected"),
    [
        (SD2, "v_prediction", "sd-turbo"),
        (SD2, "epsilon", "sd-turbo-base"),
        (SD2, None, "sd-turbo"),
        (replace(SD2, name="my folder"), "v_prediction", "sd-turbo"),
        (SD1, "epsilon", "custom"),
        (MINIATURE, "v_prediction", "miniature"),
        (TINY, "v_prediction", "custom"),
    ],
)
def test_architecture_and_prediction_name_the_family(architecture, teacher_predicts, expected):
    assert family_name(architecture, teacher_predicts) == expected
    assert expected in FAMILIES


def test_the_custom_family_asks_for_its_models():
    with pytest.raises(InputError, match=r"--student and --teacher"):
        open_family(ModelSources(family="custom"))


def test_an_adapter_of_models_without_a_name_asks_for_them(tmp_path, train_tiny, capsys):
    """It was recorded as sd-turbo, so that sampling loaded SD-Turbo and then refused the adapter."""
    from echodistill_core.adapter.file import read_adapter, write_adapter

    run = train_tiny(tmp_path / "run", iterations=1)
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    adapter.metadata["family"] = "custom"
    write_adapter(tmp_path / "mine.safetensors", adapter, TINY)
    command = ["sample", "--adapter", str(tmp_path / "mine.safetensors"), "--prompt", "a <new1> dog"]
    assert main([*command, "--out", str(tmp_path / "dog.png")]) == 2
    assert "that the run or adapter was trained on" in capsys.readouterr().err


def test_the_custom_family_takes_no_teacher_that_nobody_named(tmp_path):
    """It took the random tiny one, and that one's text encoder in place of the student's own."""
    parts = checkpoint_parts()
    parts["text_encoder"] = {n: t * 1.5 for n, t in parts["text_encoder"].items()}
    sources = ModelSources(family="custom", student=str(write_folder(tmp_path / "mine", parts)))
    family = open_family(sources, with_teacher=False)
    assert family.teacher is None
    assert torch.equal(family.text.table, parts["text_encoder"]["embeddings.token_embedding.weight"])
    with pytest.raises(InputError, match=r"no teacher .*--teacher"):
        open_family(sources)
