"""What a single file states about its prediction, against what its weights look like and what the user says."""

import pytest
import torch
from checkpoints import UNET, checkpoint_parts, refused, single_file, write_folder
from diffusers import DDPMScheduler

from echodistill_core.cli import main
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.tensorfile import write_tensors

EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def tensors():
    return single_file(checkpoint_parts())


@pytest.fixture
def write(tmp_path, tensors):
    def write(metadata=(), **marks):
        path = tmp_path / "stated.safetensors"
        write_tensors(path, {**tensors, **marks}, dict(metadata))
        return path

    return write


V = {"modelspec.prediction_type": "v"}
EPSILON = {"modelspec.prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("metadata", "marks", "expected"),
    [
        (V, {}, "v_prediction"),
        ({"modelspec.prediction_type": "v_prediction"}, {}, "v_prediction"),
        ({"modelspec.prediction_type": "V-Prediction "}, {}, "v_prediction"),
        (EPSILON, {}, "epsilon"),
        ({"ss_v_parameterization": "True"}, {}, "v_prediction"),
        ({"ss_v_parameterization": "False"}, {}, "epsilon"),
        ({"ss_v_parameterization": "None", "ss_v2": "True"}, {}, "epsilon"),
        ({}, {"v_pred": EMPTY}, "v_prediction"),
        ({}, {UNET + "v_pred": EMPTY}, "v_prediction"),
        ({}, {}, "epsilon"),
    ],
)
def test_a_file_that_states_its_prediction_is_believed(write, metadata, marks, expected):
    family = load_family(write(metadata, **marks))
    assert family.student.schedule.prediction_type == expected
    # The tiny architecture is taken for epsilon where nothing is stated.
    assert len(family.warnings) == (1 if expected == "v_prediction" else 0)
    if expected == "v_prediction":
        assert "predicts epsilon" in family.warnings[0]
        assert str(write()) in family.warnings[0]


@pytest.mark.parametrize(
    ("metadata", "marks", "expected", "said"),
    [
        (EPSILON, {"v_pred": EMPTY}, "epsilon", "the tensor v_pred states v_prediction"),
        ({**EPSILON, "ss_v_parameterization": "True"}, {}, "epsilon", "ss_v_parameterization states v_prediction"),
        ({"ss_v_parameterization": "False"}, {"v_pred": EMPTY}, "epsilon", "the tensor v_pred states v_prediction"),
    ],
)
def test_a_file_that_contradicts_itself_is_said_to(write, metadata, marks, expected, said):
    family = load_family(write(metadata, **marks))
    assert family.student.schedule.prediction_type == expected
    (warning,) = family.warnings
    assert "contradicts itself" in warning
    assert said in warning


def test_what_the_user_says_wins_and_a_contradiction_is_said(write, tmp_path):
    path = write(V)
    family = load_family(path, path, student_prediction="epsilon", teacher_prediction="v_prediction")
    assert family.student.schedule.prediction_type == "epsilon"
    assert family.teacher.schedule.prediction_type == "v_prediction"
    (warning,) = family.warnings
    assert "v_prediction (modelspec.prediction_type), but epsilon" in warning
    folder = write_folder(tmp_path / "folder", checkpoint_parts(), {"prediction_type": "v_prediction"})
    (warning,) = load_family(folder, student_prediction="sample").warnings
    assert "scheduler_config.json), but sample" in warning
    assert load_family(folder, student_prediction="v_prediction").warnings == []
    assert load_family(write(), student_prediction="v_prediction").warnings == []  # nothing is stated


def test_an_unknown_statement_is_refused_unless_the_user_says_what_it_is(write):
    path = write({"modelspec.prediction_type": "flow\x1b[31m" + "x" * 100_000})
    message = refused(path)
    assert r"'flow\x1b[31m" in message
    assert len(message) < 600
    family = load_family(path, student_prediction="epsilon")
    assert len(family.warnings) == 1
    assert len(family.warnings[0]) < 600


def test_zero_terminal_snr_with_v_rescales_the_schedule_as_diffusers_does(write):
    expected = DDPMScheduler(**TINY.scheduler, rescale_betas_zero_snr=True).alphas_cumprod
    for marks, metadata in (({"v_pred": EMPTY, "ztsnr": EMPTY}, {}), ({}, {**V, "ss_zero_terminal_snr": "True"})):
        schedule = load_family(write(metadata, **marks)).student.schedule
        assert schedule.prediction_type == "v_prediction"
        assert torch.equal(schedule.alphas_cumprod, expected)
        assert schedule.alphas_cumprod[-1] == 0


def test_zero_terminal_snr_with_epsilon_is_refused(write):
    for metadata in ({}, EPSILON):
        message = refused(write(metadata, ztsnr=EMPTY))
        assert "alphas_cumprod is 0" in message
    assert load_family(write(ztsnr=EMPTY), student_prediction="v_prediction").student.schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_edm_models_are_refused(write, mark):
    message = refused(write(**{mark: torch.tensor(120.0)}))
    assert f"tensor {mark} marks an EDM model" in message


def test_the_command_line_shows_the_contradiction(write, tmp_path, capsys):
    out = tmp_path / "picture.png"
    command = ["sample", "--family", "tiny", "--student", str(write(V)), "--prompt", "a dog", "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    assert out.exists()
    assert "warning: " in capsys.readouterr().err
