"""One new Python file adds a backbone or a family by name; nothing else in the package changes."""

import importlib.util
import textwrap

import pytest
import torch
from checkpoints import checkpoint_parts, single_file, write_folder
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.models.architectures import ARCHITECTURES, TINY
from echodistill_core.models.hub import BUNDLES, HUB, expand
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import (
    FAMILIES,
    ModelSources,
    backbone_source,
    family_name,
    settings_for,
)
from echodistill_core.models.tiny import random_weights
from echodistill_core.perception.backbones import SPECS, TINY_SPECS
from echodistill_core.perception.files import choose, mismatch_reason, shapes_in
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import EchoSettings, TrainSettings
from echodistill_core.tensorfile import write_tensors
from echodistill_core.training.run import open_run

BACKBONE = """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from echodistill_core.models.hub import HUB, HubFiles
    from echodistill_core.perception.backbones import IMAGENET, SPECS, TINY_SPECS, BackboneSpec, vit_features

    SMALL = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32
    )
    SPEC = BackboneSpec(
        "dinov2-registers", "DINO v2 with registers", 32, *IMAGENET, Dinov2WithRegistersModel, SMALL, vit_features,
        file_names=r"dinov2.*reg", other_trainings=r"xray",
    )
    HUB.register(
        SPEC.name, HubFiles("owner/repository", ("config.json", "model.safetensors"), "Apache-2.0", "with attribution")
    )
    SPECS.register(SPEC.name, SPEC)
    TINY_SPECS.register(SPEC.name, SPEC)
"""

FAMILY = """
    from dataclasses import replace

    from echodistill_core.models.architectures import ARCHITECTURES, TINY
    from echodistill_core.models.hub import BUNDLES, HUB, HubFiles
    from echodistill_core.models.sources import FAMILIES, NamedFamily

    WIDE = replace(
        TINY,
        name="wide",
        unet={{**TINY.unet, "cross_attention_dim": 48}},
        text_encoder={{**TINY.text_encoder, "hidden_size": 48, "projection_dim": 48}},
    )
    ARCHITECTURES.register(WIDE.name, WIDE)
    HUB.register("wide-student", HubFiles("owner/wide", ("model_index.json",), "OpenRAIL", "see the repository"))
    BUNDLES.register("wide-family", ("wide-student", "dino"))
    FAMILIES.register(
        "wide",
        NamedFamily(
            teacher={teacher!r}, student={student!r}, bundle="wide-family", teacher_prediction="v_prediction",
            backbones="tiny", architecture="wide",
            defaults={{"student_lr": 1e-3, "iterations": 2}}, echo_defaults={{"pool_size": 3}},
        ),
    )
"""


@pytest.fixture(autouse=True)
def _separate_registries(monkeypatch):
    """Registrations of one test, undone at its end."""
    for registry in (SPECS, TINY_SPECS, HUB, BUNDLES, FAMILIES, ARCHITECTURES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def import_file(path, code):
    path.write_text(textwrap.dedent(code))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Backbones


@pytest.fixture
def backbone_folder(tmp_path):
    """dinov2-registers: a transformers folder that save_pretrained wrote, and its model."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32
    )
    model = Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path / "backbones" / "dinov2-registers")
    return tmp_path / "backbones", model


def test_a_registered_backbone_is_loaded_from_a_folder(tmp_path, backbone_folder):
    folder, model = backbone_folder
    import_file(tmp_path / "registers.py", BACKBONE)
    loaded = load_backbones({"critic": "dinov2-registers"}, str(folder))["critic"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(((x + 1) / 2 - mean) / std).last_hidden_state[:, 0]
        assert torch.allclose(loaded(x), expected, atol=1e-6)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_registered_backbone_has_a_download_and_a_tiny_version(tmp_path):
    import_file(tmp_path / "registers.py", BACKBONE)
    assert expand(["dinov2-registers", "dino"]) == ["dinov2-registers", "dino"]
    with pytest.raises(InputError, match="echodistill download dinov2-registers"):
        load_backbones({"critic": "dinov2-registers"}, {})
    first, second = (load_backbones({"critic": "dinov2-registers"}, "tiny")["critic"] for _ in range(2))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(x), second(x))
    assert first(x).shape == (1, 32)


def test_a_registered_backbone_is_found_among_other_files(tmp_path, backbone_folder):
    folder, _ = backbone_folder
    import_file(tmp_path / "registers.py", BACKBONE)
    path = folder / "dinov2-registers" / "model.safetensors"
    assert mismatch_reason(shapes_in(path), SPECS["dinov2-registers"], "dinov2_reg.safetensors") == ""
    assert mismatch_reason(shapes_in(path), SPECS["dinov2-registers"], "xray_dinov2_reg.safetensors")
    other = tmp_path / "dinov2_reg_other.safetensors"
    write_tensors(other, {"embeddings.cls_token": torch.zeros(1, 1, 16)}, {})
    found, reasons = choose("dinov2-registers", [(other, other.name), (path, "model.safetensors")])
    assert found == path
    assert len(reasons) == 1
    assert str(other) in reasons[0]


def test_a_file_of_another_shape_is_refused_by_its_path(tmp_path, backbone_folder):
    folder, model = backbone_folder
    import_file(tmp_path / "registers.py", BACKBONE)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    tensors["embeddings.register_tokens"] = torch.zeros(1, 2, 32)
    write_tensors(folder / "dinov2-registers" / "model.safetensors", tensors, {})
    with pytest.raises(InputError, match=r"dinov2-registers is no .*register_tokens"):
        load_backbones({"critic": "dinov2-registers"}, str(folder))


@pytest.mark.parametrize("source", ["", "tiny", "miniature"])
def test_an_unregistered_backbone_is_refused_with_the_nearest_name(source):
    with pytest.raises(InputError, match="did you mean dinov2"):
        load_backbones({"critic": "dinov3"}, source)


@pytest.mark.parametrize(("source", "registry"), [("tiny", TINY_SPECS), ("miniature", None)])
def test_a_family_without_the_backbone_says_which_it_has(tmp_path, source, registry):
    import_file(tmp_path / "registers.py", BACKBONE)
    if registry is not None:
        registry.unregister("dinov2-registers")
    with pytest.raises(InputError, match="no backbone 'dinov2-registers'"):
        load_backbones({"critic": "dinov2-registers"}, source)


# Families


def wide_parts(seed):
    """Random weights of the family's networks: TINY with a text encoder of width 48."""
    from dataclasses import replace

    from echodistill_core.models.assemble import empty_text_encoder, empty_unet

    wide = replace(
        TINY,
        unet={**TINY.unet, "cross_attention_dim": 48},
        text_encoder={**TINY.text_encoder, "hidden_size": 48, "projection_dim": 48},
    )
    unet, text = (random_weights(empty(wide).state_dict(), seed) for empty in (empty_unet, empty_text_encoder))
    return {**checkpoint_parts(), "unet": unet, "text_encoder": text}


@pytest.fixture
def wide_family(tmp_path):
    """A registered family whose teacher and student are single files in Stable Diffusion's original layout."""
    paths = {role: tmp_path / f"{role}.safetensors" for role in ("teacher", "student")}
    for seed, path in enumerate(paths.values()):
        write_tensors(path, single_file(wide_parts(seed)), {})
    import_file(tmp_path / "wide.py", FAMILY.format(**{role: str(path) for role, path in paths.items()}))
    return paths


def test_a_registered_family_is_opened_from_its_files(wide_family):
    sources = ModelSources(family="wide")
    family = open_family(sources)
    assert (family.name, family.architecture.name) == ("wide", "wide")
    assert family.teacher.schedule.prediction_type == "v_prediction"
    for seed, denoiser in enumerate((family.teacher, family.student)):
        expected = wide_parts(seed)["unet"]
        assert all(torch.equal(t, expected[n]) for n, t in denoiser.unet.state_dict().items())
    assert family.student.licence == "that of the checkpoint student.safetensors"
    assert family_name(family.architecture, "v_prediction") == "wide"
    assert backbone_source(sources) == "tiny"
    assert settings_for(TrainSettings, {}, sources) == TrainSettings(student_lr=1e-3, iterations=2)
    assert settings_for(EchoSettings, {}, sources) == EchoSettings(pool_size=3)
    assert expand(["wide-family"]) == ["wide-student", "dino"]


def test_a_family_of_a_known_architecture_needs_folders_alone(tmp_path):
    folder = write_folder(tmp_path / "mine", checkpoint_parts(), scheduler={"prediction_type": "v_prediction"})
    code = f"""
        from echodistill_core.models.sources import FAMILIES, NamedFamily

        FAMILIES.register("mine", NamedFamily(teacher={str(folder)!r}, student={str(folder)!r}))
    """
    import_file(tmp_path / "mine.py", code)
    family = open_family(ModelSources(family="mine"))
    assert family.teacher.schedule.prediction_type == "v_prediction"


def test_the_command_line_trains_a_registered_family(wide_family, tmp_path, photographs, capsys):
    off = ["--alignment-weight", "0", "--adversarial-weight", "0", "--teacher-weight", "0", "--preview-every", "0"]
    train = ["train", "--photos", str(photographs), "--class-noun", "dog", "--family", "wide", "--device", "cpu"]
    out = tmp_path / "run"
    assert main([*train, *off, "--student-reconstruction-weight", "1", "--out", str(out)]) == 0
    run = open_run(out)
    assert run.settings.student_lr == 1e-3
    assert len(run.read_log("distil")) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "wide" in capsys.readouterr().out


def test_a_family_is_refused_before_it_is_registered(capsys):
    with pytest.raises(InputError, match="setting family"):
        ModelSources(family="wide")
    assert main(["train", "--family", "wide"]) == 2
    assert "--family" in capsys.readouterr().err


def test_a_taken_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="sd-turbo"):
        FAMILIES.register("sd-turbo", FAMILIES["tiny"])


def test_a_missing_file_of_a_family_is_named(wide_family):
    wide_family["teacher"].unlink()
    with pytest.raises(InputError, match=r"teacher\.safetensors"):
        open_family(ModelSources(family="wide"))
