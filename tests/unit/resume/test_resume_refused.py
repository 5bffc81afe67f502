"""Which changes of settings, photographs and models make another run, and which do not."""

import dataclasses
import shutil

import numpy as np
import pytest
import resume_worker
from PIL import Image
from resume_worker import ECHO, SOURCES, fresh_family, photographs, settings
from resumed_runs import difference, echo, times, train
from run_files import stop_at, tree

from echodistill_core.concept.photographs import Photograph, load_photographs
from echodistill_core.errors import InputError
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.settings import EchoSettings, TrainSettings, affecting_result
from echodistill_core.training import resume, run, session
from echodistill_core.training.events import PoolProgress


def other_value(field):
    """A value that is allowed and not what the runs here have."""
    value, meta = getattr(settings(), field.name), field.metadata
    if isinstance(value, bool):
        return not value
    if meta["choices"]:
        return next(c for c in meta["choices"] if c != value)
    if isinstance(value, str):
        return {"device": "cpu:0", "extra_losses": "zebra=0", "extra_critics": "zebra=0"}.get(field.name, "zebra")
    step = 1 if isinstance(value, int) else 0.25
    return value + step if meta["high"] is None or value + step <= meta["high"] else value - step


def reopened(folder, pictures=None, **overrides):
    chosen, family = settings(**overrides), resume_worker.opened_family()
    images = session.square_images(
        (pictures or photographs())[: chosen.max_photographs or None], chosen.resolution or 64, chosen.crop
    )
    return resume.create_or_resume(folder, chosen, SOURCES, images, family)


DETERMINING = (*affecting_result(settings()), "extra_losses", "extra_critics")  # the last two are empty by default


@pytest.mark.parametrize("name", [n for n in DETERMINING if n not in ("resolution", "max_photographs")])
def test_a_setting_that_determines_the_result_is_refused_by_name(folder, name):
    field = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    value, before = other_value(field), tree(folder)
    with pytest.raises(InputError, match="holds another run") as caught:
        reopened(folder, **{name: value})
    assert f": {name} is {getattr(settings(), name)!r} there and {value!r} here;" in str(caught.value)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"iterations": 6}, "iterations is 5 there and 6 here"),
        ({"resolution": 128}, "resolution is 64 there and 128 here"),
        ({"max_photographs": 1}, "max_photographs is 0 there and 1 here"),
        ({"preset": "tuned"}, "backbone_normalisation is False there and True here"),
        ({"class_noun": "cat", "student_lr": 1e-3}, "class_noun is 'dog' there and 'cat' here, student_lr is 2e-05"),
    ],
)
def test_a_changed_run_is_refused_before_it_is_touched(folder, overrides, named):
    before, when = tree(folder), times(folder)
    with pytest.raises(InputError, match=named):
        train(folder, **overrides)
    assert tree(folder) == before
    assert times(folder) == when


@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(TrainSettings) if f.name not in ("preset", *DETERMINING)],
)
def test_a_setting_that_does_not_determine_the_result_may_change(folder, name):
    field = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    fingerprint = run.open_run(folder).fingerprint("distil")
    opened = reopened(folder, **{name: other_value(field)})
    assert opened.fingerprint("distil") == fingerprint
    assert getattr(run.open_run(folder).settings, name) == other_value(field)


def test_a_single_changed_pixel_is_another_run(folder):
    pictures = photographs()
    pixels = np.array(pictures[1].image)
    pixels[17, 30, 2] ^= 1
    before = tree(folder)
    for changed in (
        [pictures[0], Photograph("1.png", Image.fromarray(pixels))],
        pictures[::-1],
        pictures[:1],
        [*pictures, pictures[0]],
    ):
        with pytest.raises(InputError, match="holds another run: photographs is '"):
            train(folder, pictures=changed)
    assert tree(folder) == before


def test_photographs_that_were_moved_or_renamed_are_the_same_run(folder, tmp_path, reference):
    (tmp_path / "elsewhere").mkdir()
    for name, picture in zip(("a long name.bmp", "b.tiff"), photographs(), strict=True):
        picture.image.save(tmp_path / "elsewhere" / name)
    train(folder, pictures=load_photographs(tmp_path / "elsewhere"))
    assert difference(tree(folder), reference.distil) == []


def changed_family(what):
    parts = {"student": tiny_checkpoint("student"), "teacher": tiny_checkpoint("teacher")}
    if what == "text_encoder":
        for part in parts.values():
            next(iter(part["text_encoder"].values()))[0, 0] += 1
    else:
        next(t for n, t in parts[what]["unet"].items() if n.endswith("attn2.to_k.weight"))[0, 0] += 1
    return load_family(parts["student"], parts["teacher"], teacher_prediction="v_prediction", architecture=TINY)


@pytest.mark.parametrize("what", ["student", "teacher", "text_encoder"])
def test_other_models_are_another_run(folder, reference, what):
    before, echoed = tree(folder), tree(reference.folder)
    with pytest.raises(InputError, match=f"holds another run: {what} is '"):
        train(folder, family=changed_family(what))
    with pytest.raises(InputError, match=f"other models: {what} is '"):
        echo(reference.folder, family=changed_family(what))
    assert tree(folder) == before
    assert tree(reference.folder) == echoed


def test_another_prediction_type_is_another_run(folder):
    family = fresh_family()
    family.teacher.schedule = dataclasses.replace(family.teacher.schedule, prediction_type="epsilon")
    with pytest.raises(InputError, match=r"teacher is '\w+ \(v_prediction\)' .*\(epsilon\)"):
        train(folder, family=family)


@pytest.mark.parametrize("field", dataclasses.fields(EchoSettings), ids=lambda f: f.name)
def test_an_echo_of_other_settings_is_refused_by_name(reference, field):
    value = getattr(ECHO, field.name)
    other = not value if isinstance(value, bool) else "a <new1> dog" if value == "" else 0.25 if value == 0.5 else 9
    with pytest.raises(InputError, match=f"{field.name} is {value!r} there and {other!r} here"):
        echo(reference.folder, how=dataclasses.replace(ECHO, **{field.name: other}))
    assert tree(reference.folder) == reference.echo


def test_without_its_folder_an_echo_may_be_done_again(reference, tmp_path):
    shutil.copytree(reference.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "echo")
    with pytest.raises(KeyboardInterrupt):
        echo(tmp_path, stop_at(PoolProgress), how=EchoSettings(iterations=1, pool_size=1))
    shutil.rmtree(tmp_path / "echo")
    echo(tmp_path)
    assert difference(tree(tmp_path), reference.echo) == []


def test_a_run_that_is_not_trained_to_its_end_is_not_echoed(folder):
    before = tree(folder)
    with pytest.raises(InputError, match="not trained to its end"):
        echo(folder)
    assert tree(folder) == before


def test_photographs_in_the_folder_that_were_changed_stop_an_echo(reference, tmp_path):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "photographs" / "000.png", tmp_path / "photographs" / "001.png")
    with pytest.raises(InputError, match="photographs was changed"):
        echo(tmp_path)
