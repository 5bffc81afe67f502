"""The bench: what it runs, that it resumes, what its scores are, and that its folder belongs to one suite."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from echodistill_core.errors import DivergedError, InputError
from echodistill_core.evaluation import bench, methods, paper, scoring, suites
from echodistill_core.evaluation.sheets import open_picture
from echodistill_core.miniature.concepts import CONCEPTS, DEVELOPMENT, EVALUATION
from echodistill_core.miniature.judges import load_judges
from echodistill_core.settings import PRESETS, TrainSettings

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
    evaluated = {spec.method for training in methods.METHODS.values() for spec in training.evaluations}
    wanted = {f.method for f in paper.FIGURES.values() if f.measured_here}
    assert wanted <= evaluated


def test_the_full_suite_is_as_large_as_it_promises():
    suite = suites.MINIATURE
    assert len(suite.concepts) >= 6
    assert len(suite.seeds) >= 3
    assert suite.sampling_seeds >= 4
    assert suite.prompts in (0, 8)
    assert not set(suite.concepts) & {c.name for c in DEVELOPMENT}


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_trainings_settings_are_settings(name):
    training = methods.METHODS[name]
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


def test_a_bench_writes_every_cell_and_does_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", InProcess)
    said = []
    paths = suites.bench(tmp_path, LITTLE, workers=1, command="echodistill bench", log=said.append)
    rows = json.loads((tmp_path / "results.json").read_text())
    evaluated = [spec.method for name in LITTLE.trainings for spec in methods.METHODS[name].evaluations]
    assert [row["method"] for row in rows] == [*paper.REFERENCES, *evaluated]
    for row in rows:
        assert set(row["metrics"]) == {"clip_t", "clip_i", "dino", "attributes", "context", "diversity"}
        assert open_picture(tmp_path, row["picture"]).size == (2 * 64 + 3 * 4, 64 + 2 * 4)
        assert not row["diverged"]
    real = next(row for row in rows if row["method"] == "photographs")["metrics"]
    assert real["context"] > 0.9
    assert real["attributes"] > 0.9
    assert all(real["dino"] > row["metrics"]["dino"] for row in rows if row["method"] != "photographs")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert "EchoDistill" in paths[0].read_text()
    monkeypatch.setattr(bench, "run_cell", lambda *_: pytest.fail("a cell was run again"))
    suites.bench(tmp_path, LITTLE, workers=1, command="echodistill bench", log=said.append)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def recorded(name, seed=0):
    """A cell's rows, without any training."""
    cell = bench.Cell(name, EVALUATION[0].name, seed)
    specs = methods.METHODS[name].evaluations if name in methods.METHODS else [methods.EvalSpec(name)]
    return cell, [bench._row(cell, spec, 7) for spec in specs]


def test_results_alone_carry_a_bench_to_another_place(tmp_path, monkeypatch):
    """results.json without the files of its cells: what it holds is not run again, and what is missing joins it."""
    known = [*paper.REFERENCES, "echodistill"]
    rows = [row for name in known for row in recorded(name)[1]] + recorded("lora", seed=9)[1]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    ran = []

    def run_cell(folder, suite, cell):
        ran.append(cell.training)
        found = recorded(cell.training, cell.seed)[1]
        bench._result(folder, cell).parent.mkdir(exist_ok=True)
        bench._result(folder, cell).write_text(json.dumps(found))
        return found

    monkeypatch.setattr(bench, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(bench, "run_cell", run_cell)
    told = bench.run_cells(tmp_path, LITTLE, 1, lambda line: None)
    assert ran == ["teacher-first"]
    assert [row["method"] for row in told] == [row["method"] for row in rows[:-1]] + ["teacher-first"]
    # Of another seed than the suite's: not in its report, and not lost either.
    assert json.loads((tmp_path / "results.json").read_text()) == [*rows, *recorded("teacher-first")[1]]


def test_a_report_of_what_is_there_runs_nothing_and_names_who_measured(tmp_path, monkeypatch):
    suites._check_record(tmp_path, LITTLE)
    suites._record_run(tmp_path, "echodistill bench --seeds 1", 2)
    (tmp_path / "results.json").write_text(json.dumps(recorded("teacher-first")[1]))
    monkeypatch.setattr(bench, "run_cell", lambda *_: pytest.fail("a cell was run"))
    path, _ = suites.bench(tmp_path, LITTLE, workers=0, command="echodistill bench --report", log=pytest.fail)
    text = path.read_text()
    assert "- command: echodistill bench --seeds 1\n" in text
    assert "Teacher first, then distilled" in text
    assert "Not run: EchoDistill, before echo" in text


def test_there_is_no_report_on_a_folder_without_a_bench(tmp_path):
    with pytest.raises(InputError, match=r"no suite\.json.*--out"):
        suites.bench(tmp_path / "new", LITTLE, workers=0, command="echodistill bench --report", log=pytest.fail)
    assert not (tmp_path / "new").exists()


def test_every_machine_that_measured_is_named_once(tmp_path):
    suites._check_record(tmp_path, LITTLE)
    for command in ("bench a", "bench b", "bench a"):
        suites._record_run(tmp_path, command, 2)
    suites._check_record(tmp_path, LITTLE)
    header = suites._header(tmp_path, LITTLE)
    assert header["command"] == "bench a"
    assert [run["command"] for run in header["measured before that"]] == ["bench b"]


@pytest.mark.parametrize("content", ["[{", '[{"concept": "a"}]', '["a"]'])
def test_a_file_that_holds_no_results_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json .*choose another --out"):
        bench.run_cells(tmp_path, LITTLE, 1, lambda line: None)


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    def diverge(*_args, **_more):
        raise DivergedError("teacher is nan")

    monkeypatch.setattr(bench, "train", diverge)
    (tmp_path / "cells").mkdir()
    rows = bench.run_cell(tmp_path, LITTLE, bench.Cell("echodistill", EVALUATION[0].name, 0))
    assert all(row["diverged"] and row["metrics"] is None for row in rows)


def test_ctrl_c_does_not_wait_for_the_cells_that_are_still_to_come(tmp_path, monkeypatch):
    begun, stopped = [], threading.Event()

    def run_cell(_folder, _suite, cell):
        begun.append(cell)
        if len(begun) > 1:
            stopped.wait(10)
        return [{"metrics": None}]

    def stop(_line):
        raise KeyboardInterrupt

    class OneThread(ThreadPoolExecutor):
        def __init__(self, *_args, **_more):
            super().__init__(1)

        def __exit__(self, *error):
            stopped.set()
            return super().__exit__(*error)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", OneThread)
    monkeypatch.setattr(bench, "run_cell", run_cell)
    with pytest.raises(KeyboardInterrupt):
        bench.run_cells(tmp_path, LITTLE, 1, stop)
    assert len(begun) <= 2 < len(bench.cells_of(LITTLE))  # the one that was told, and the one that was running


def test_a_folder_of_another_suite_is_refused(tmp_path):
    suites._check_record(tmp_path, LITTLE)
    suites._check_record(tmp_path, LITTLE)
    with pytest.raises(InputError, match="sampling_seeds is 2 there and 4 now"):
        suites._check_record(tmp_path, suites.MINIATURE)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(InputError, match=r"no suite\.json, but report\.md"):
        suites.bench(tmp_path, LITTLE, workers=1, command="echodistill bench", log=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


KILLED_PARENT = """
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from echodistill_core.evaluation.bench import _begin_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(KILLED_PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE)
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    # The worker holds the same output: it is at its end when the worker is.
    assert parent.communicate(timeout=60) == (b"", None)


def test_a_folder_of_other_weights_is_refused(tmp_path, monkeypatch):
    suites._check_record(tmp_path, LITTLE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    monkeypatch.setattr(suites, "FOLDER", tmp_path / "other")
    with pytest.raises(InputError, match="another suite: weights is"):
        suites._check_record(tmp_path, LITTLE)


def test_a_folder_of_other_recommended_settings_is_refused(tmp_path, monkeypatch):
    """Unless the training that they change is not in there yet, or they are newer than the folder."""
    suites._check_record(tmp_path, LITTLE)
    monkeypatch.setitem(PRESETS, "tuned", {"student_lr": 7e-7})
    suites._check_record(tmp_path, replace(LITTLE, trainings=("echodistill", "tuned")))
    monkeypatch.setitem(PRESETS, "tuned", {"student_lr": 8e-7})
    suites._check_record(tmp_path, LITTLE)
    with pytest.raises(InputError, match=r"training tuned is .*7e-07.* there and .*8e-07.* now"):
        suites._check_record(tmp_path, replace(LITTLE, trainings=("tuned",)))
    older = json.loads((tmp_path / "suite.json").read_text())
    del older["training echodistill"]["lr_decay"]
    del older["training tuned"]["image_every"]
    (tmp_path / "suite.json").write_text(json.dumps(older))
    suites._check_record(tmp_path, LITTLE)
    monkeypatch.setitem(PRESETS, "tuned", {"student_lr": 7e-7, "image_every": 3})
    with pytest.raises(InputError, match=r"training tuned is .*'image_every': 3.* now"):
        suites._check_record(tmp_path, replace(LITTLE, trainings=("tuned",)))


def test_results_that_cannot_be_read_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", InProcess)
    for cell in bench.cells_of(LITTLE):
        bench._result(tmp_path, cell).parent.mkdir(exist_ok=True)
        bench._result(tmp_path, cell).write_text("[]")
    broken = bench._result(tmp_path, bench.cells_of(LITTLE)[-1])
    broken.write_text("[{")
    with pytest.raises(InputError, match=r"cannot be read .* remove it") as error:
        bench.run_cells(tmp_path, LITTLE, 1, lambda line: None)
    assert str(broken) in str(error.value)
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(InputError, match=r"suite\.json cannot be read .*--out"):
        suites._check_record(tmp_path, LITTLE)


def test_choosing_trainings_concepts_and_seeds():
    suite = suites.select(suites.MINIATURE, trainings=["lora"], seeds=2, development=True)
    assert suite.trainings == ("lora",)
    assert suite.seeds == (0, 1)
    assert suite.concepts == tuple(c.name for c in DEVELOPMENT)
    with pytest.raises(InputError, match=r"expected one of .* did you mean lora"):
        suites.select(suites.MINIATURE, trainings=["lore"], seeds=0, development=False)


def test_real_samples_score_as_the_concept_in_the_contexts_asked_for():
    judges = load_judges()
    for concept in CONCEPTS.values():
        scores = scoring.score(scoring.reference_samples(concept, 4), concept, "", judges)
        assert scores["attributes"] > 0.9, concept.name
        assert scores["context"] > 0.9, concept.name


def test_another_subject_scores_lower_than_the_concept_itself():
    judges = load_judges()
    first, other = EVALUATION[0], EVALUATION[1]
    own = scoring.score(scoring.reference_samples(first, 2), first, "", judges)
    wrong = scoring.score(scoring.reference_samples(other, 2), first, "", judges)
    for metric in ("clip_i", "dino", "attributes"):
        assert own[metric] > wrong[metric] + 0.05, metric
    # Of prompts that name no colours, CLIP-T reads the place far more than the thing (docs/results.md).
    assert own["clip_t"] > wrong["clip_t"]


def test_prompts_of_other_places_score_lower():
    judges = load_judges()
    concept = EVALUATION[0]
    samples = scoring.reference_samples(concept, 2)
    turned = replace(samples, prompts=samples.prompts[1:] + samples.prompts[:1])
    own, wrong = (scoring.score(s, concept, "", judges)["clip_t"] for s in (samples, turned))
    assert own > wrong + 0.3


def test_scores_are_means_over_prompts_and_seeds():
    judges = load_judges()
    concept = EVALUATION[0]
    samples = scoring.reference_samples(concept, 2)
    whole = scoring.score(samples, concept, "", judges)["dino"]
    parts = []
    for i in range(8):
        part = scoring.Samples(
            samples.images[2 * i : 2 * i + 2], samples.prompts[i : i + 1], samples.contexts[i : i + 1], 2
        )
        parts.append(scoring.score(part, concept, "", judges)["dino"])
    assert whole == pytest.approx(float(torch.tensor(parts).mean()), abs=1e-5)


class InProcess:
    """An executor that runs each job at once, in this process."""

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
