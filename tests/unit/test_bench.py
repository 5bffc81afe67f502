"""The bench: what it runs, that it resumes, what its scores are, and that its folder belongs to one suite."""

import json

import pytest
import torch

from echodistill_core.errors import DivergedError, InputError
from echodistill_core.evaluation import bench, methods, paper, scoring, suites
from echodistill_core.miniature.concepts import CONCEPTS, DEVELOPMENT, EVALUATION
from echodistill_core.miniature.judges import load_judges
from echodistill_core.models import embedded
from echodistill_core.settings import TrainSettings

with_weights = pytest.mark.skipif(not embedded.FOLDER.is_dir(), reason="the embedded weights are not in this checkout")
LITTLE = bench.Suite(
    (EVALUATION[0].name,),
    (0,),
    ("echodistill", "teacher-first"),
    sampling_seeds=2,
    prompts=2,
    options={"iterations": 2, "swd_projections": 8},
    echo_options={"iterations": 1, "pool_size": 2},
)


def test_every_method_of_the_papers_tables_that_is_ours_to_measure_has_a_training():
    looked_at = {look.method for training in methods.TRAININGS.values() for look in training.looks}
    wanted = {f.method for f in paper.FIGURES.values() if f.measured_here}
    assert wanted <= looked_at


def test_the_full_suite_is_as_large_as_it_promises():
    suite = suites.MINIATURE
    assert len(suite.concepts) >= 6
    assert len(suite.seeds) >= 3
    assert suite.sampling_seeds >= 4
    assert suite.prompts in (0, 8)
    assert not set(suite.concepts) & {c.name for c in DEVELOPMENT}


@pytest.mark.parametrize("name", list(methods.TRAININGS))
def test_every_trainings_settings_are_settings(name):
    training = methods.TRAININGS[name]
    settings = bench.settings_of(suites.MINIATURE, training, EVALUATION[0], 1)
    assert isinstance(settings, TrainSettings)
    for option, value in training.options.items():
        assert getattr(settings, option) == value
    assert settings.seed == 1
    assert settings.class_noun == EVALUATION[0].subject.shape


def test_baselines_learn_from_photographs_alone():
    for name in ("textual-inversion", "custom-diffusion", "dreambooth", "lora"):
        settings = bench.settings_of(suites.MINIATURE, methods.TRAININGS[name], EVALUATION[0], 0)
        assert not settings.teaches
        assert not settings.aligns
        assert not settings.critic_weights
        assert settings.student_reconstruction_weight == 1


@with_weights
def test_a_bench_writes_every_cell_and_does_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", InProcess)
    said = []
    paths = suites.bench(tmp_path, LITTLE, workers=1, command="echodistill bench", say=said.append)
    rows = json.loads((tmp_path / "results.json").read_text())
    looks = [look.method for name in LITTLE.trainings for look in methods.TRAININGS[name].looks]
    assert [row["method"] for row in rows] == [*paper.REFERENCES, *looks]
    for row in rows:
        assert set(row["metrics"]) == {"clip_t", "clip_i", "dino", "attributes", "context", "diversity"}
        assert (tmp_path / row["picture"]).is_file()
        assert not row["diverged"]
    real = next(row for row in rows if row["method"] == "photographs")["metrics"]
    assert real["context"] > 0.9
    assert real["attributes"] > 0.9
    assert all(real["dino"] > row["metrics"]["dino"] for row in rows if row["method"] != "photographs")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert "EchoDistill" in paths[0].read_text()
    monkeypatch.setattr(bench, "run_cell", lambda *_: pytest.fail("a cell was run again"))
    suites.bench(tmp_path, LITTLE, workers=1, command="echodistill bench", say=said.append)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


@with_weights
def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    def diverge(*_args, **_more):
        raise DivergedError("teacher is nan")

    monkeypatch.setattr(bench, "train", diverge)
    (tmp_path / "cells").mkdir()
    rows = bench.run_cell(tmp_path, LITTLE, bench.Cell("echodistill", EVALUATION[0].name, 0))
    assert all(row["diverged"] and row["metrics"] is None for row in rows)


def test_a_folder_of_another_suite_is_refused(tmp_path):
    suites._declare(tmp_path, LITTLE)
    suites._declare(tmp_path, LITTLE)
    with pytest.raises(InputError, match="sampling_seeds is 2 there and 4 now"):
        suites._declare(tmp_path, suites.MINIATURE)


def test_choosing_trainings_concepts_and_seeds():
    suite = suites.chosen(suites.MINIATURE, trainings=["lora"], seeds=2, development=True)
    assert suite.trainings == ("lora",)
    assert suite.seeds == (0, 1)
    assert suite.concepts == tuple(c.name for c in DEVELOPMENT)
    with pytest.raises(InputError, match="did you mean lora"):
        suites.chosen(suites.MINIATURE, trainings=["lore"], seeds=0, development=False)


@with_weights
def test_real_samples_score_as_the_concept_in_the_contexts_asked_for():
    judges = load_judges()
    for concept in CONCEPTS.values():
        scores = scoring.score(scoring.real(concept, 4), concept, "", judges)
        assert scores["attributes"] > 0.9, concept.name
        assert scores["context"] > 0.9, concept.name


@with_weights
def test_another_subject_scores_lower_than_the_concept_itself():
    judges = load_judges()
    first, other = EVALUATION[0], EVALUATION[1]
    own = scoring.score(scoring.real(first, 2), first, "", judges)
    wrong = scoring.score(scoring.real(other, 2), first, "", judges)
    for metric in ("clip_i", "dino", "attributes"):
        assert own[metric] > wrong[metric] + 0.05, metric


@with_weights
def test_scores_are_means_over_prompts_and_seeds():
    judges = load_judges()
    concept = EVALUATION[0]
    samples = scoring.real(concept, 2)
    whole = scoring.score(samples, concept, "", judges)["dino"]
    parts = []
    for i in range(8):
        part = scoring.Samples(
            samples.images[2 * i : 2 * i + 2], samples.prompts[i : i + 1], samples.contexts[i : i + 1], 2
        )
        parts.append(scoring.score(part, concept, "", judges)["dino"])
    assert whole == pytest.approx(float(torch.tensor(parts).mean()), abs=1e-5)


class InProcess:
    """A pool that computes at once, here."""

    def __init__(self, *_args, **_more):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_args):
        return None

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future
