"""What a run and its adapters record as the family of their models."""

from dataclasses import replace

import pytest

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
    with pytest.raises(InputError, match=r"no models of its own; name .* --student and --teacher"):
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
    assert "name those that the run or adapter was trained on" in capsys.readouterr().err
