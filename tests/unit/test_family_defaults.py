"""What a family recommends for its networks: what wins over it, and that a run remembers what it came to."""

import dataclasses
import json

import pytest
from registries import replace_entry

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.models.sources import FAMILIES, ModelSources, settings_for
from echodistill_core.settings import EchoSettings, TrainSettings, affecting_result, from_options
from echodistill_core.training.run import open_run

TINY = ModelSources(family="tiny")
# One that no preset names, one that `tuned` names too, and ones that both settings have.
TABLE = {"student_lr": 1e-3, "image_every": 5, "iterations": 2}
ECHO_TABLE = {"iterations": 3, "pool_size": 2}


@pytest.fixture
def recommending(monkeypatch):
    """The tiny family, with values of its own."""
    named = dataclasses.replace(FAMILIES["tiny"], defaults=TABLE, echo_defaults=ECHO_TABLE)
    replace_entry(monkeypatch, FAMILIES, "tiny", named)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_recommends_settings_that_there_are(name):
    sources = ModelSources(family=name)
    for cls, table in ((TrainSettings, FAMILIES[name].defaults), (EchoSettings, FAMILIES[name].echo_defaults)):
        settings = settings_for(cls, {}, sources)
        assert {f: getattr(settings, f) for f in table} == dict(table)
        assert "preset" not in table


@pytest.mark.parametrize("name", ["sd-turbo", "sd-turbo-base", "hyper-sd15", "tiny"])
def test_families_at_the_papers_scale_recommend_nothing(name):
    assert settings_for(TrainSettings, {}, ModelSources(family=name)) == TrainSettings()
    assert settings_for(EchoSettings, {}, ModelSources(family=name)) == EchoSettings()


@pytest.mark.usefixtures("recommending")
def test_explicit_wins_over_the_preset_over_the_family_over_the_default():
    plain = settings_for(TrainSettings, {}, TINY)
    assert plain == TrainSettings(**TABLE)
    tuned = settings_for(TrainSettings, {"preset": "tuned"}, TINY)
    assert (tuned.image_every, tuned.backbone_normalisation) == (3, True)  # the preset's
    assert (tuned.student_lr, tuned.iterations) == (1e-3, 2)  # the family's
    assert tuned.teacher_lr == TrainSettings().teacher_lr
    chosen = settings_for(TrainSettings, {"preset": "tuned", "student_lr": 2e-5, "image_every": 1}, TINY)
    assert (chosen.student_lr, chosen.image_every) == (2e-5, 1)  # though they are the defaults
    assert settings_for(EchoSettings, {"pool_size": 9}, TINY) == EchoSettings(iterations=3, pool_size=9)
    assert settings_for(TrainSettings, {}, ModelSources()) == TrainSettings()


def test_a_recommendation_is_checked_like_any_value():
    with pytest.raises(InputError, match="there is no setting 'studnet_lr'; did you mean student_lr"):
        from_options(TrainSettings, {}, {"studnet_lr": 1.0})
    with pytest.raises(InputError, match=r"setting student_lr is 2\.0; expected 0\.0 to 1\.0"):
        from_options(TrainSettings, {}, {"student_lr": 2.0})


@pytest.mark.usefixtures("recommending")
def test_a_run_of_the_command_line_keeps_what_the_family_recommended(photographs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    off = ["--alignment-weight", "0", "--adversarial-weight", "0", "--teacher-weight", "0", "--preview-every", "0"]
    train = ["train", "--photos", str(photographs), "--class-noun", "dog", "--family", "tiny", "--device", "cpu"]
    assert main([*train, *off, "--student-reconstruction-weight", "1", "--out", str(folder)]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert {name: record["settings"][name] for name in TABLE} == TABLE
    assert record["identity"]["student_lr"] == 1e-3
    assert len(open_run(folder).read_log("distil")) == 2
    assert main(["echo", str(folder)]) == 0
    run = open_run(folder)
    assert run.record["echo"] == affecting_result(EchoSettings(**ECHO_TABLE))
    assert len(run.read_log("echo")) == 3
    # Another version of the program, which recommends nothing, reads it as it was.
    replace_entry(monkeypatch, FAMILIES, "tiny", dataclasses.replace(FAMILIES["tiny"], defaults={}, echo_defaults={}))
    assert {name: getattr(open_run(folder).settings, name) for name in TABLE} == TABLE
    capsys.readouterr()
    assert main([*train, *off, "--student-reconstruction-weight", "1", "--out", str(folder)]) == 2
    assert "iterations is 2 there and 1000 here" in capsys.readouterr().err


def test_the_help_says_what_wins(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for command in ("train", "echo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        order = [text.index(word, text.index("Precedence")) for word in ("flag", "--config", "--preset", "family")]
        assert order == sorted(order)
