"""One new module adds a baseline or a suite: the bench runs it, and command line and report know it."""

import json
import sys

import pytest

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.evaluation import bench, methods, suites
from echodistill_core.evaluation.plots import group

BASELINE = """
from echodistill_core.evaluation.methods import METHODS, EvalSpec, Training

METHODS.register(
    "low-rank-4",
    Training(
        "low-rank-4",
        (EvalSpec("low-rank-4", title="LoRA of rank 4", table="1"),),
        {
            "teacher_weight": 0.0,
            "alignment_weight": 0.0,
            "adversarial_weight": 0.0,
            "student_reconstruction_weight": 1.0,
            "trainable": "lora+token",
            "lora_rank": 4,
        },
    ),
)
"""

SUITE = """
from echodistill_core.evaluation.bench import Suite
from echodistill_core.evaluation.suites import SUITES

SUITES.register(
    "one-mug",
    Suite(
        concepts=("dotted-mug",),
        seeds=(0,),
        trainings=("low-rank-4",),
        sampling_seeds=2,
        prompts=2,
        options={"iterations": 2},
    ),
)
"""


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Both modules imported from a folder of their own; what they registered is removed again."""
    for name, text in (("my_baseline", BASELINE), ("my_suite", SUITE)):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_baseline")
    __import__("my_suite")
    yield
    methods.METHODS.unregister("low-rank-4")
    suites.SUITES.unregister("one-mug")
    for name in ("my_baseline", "my_suite"):
        del sys.modules[name]


@pytest.mark.slow
def test_the_bench_runs_and_reports_a_registered_baseline_and_suite(extended, tmp_path):
    """In worker processes, which do not import the modules themselves."""
    out = tmp_path / "bench"
    assert main(["bench", "--suite", "one-mug", "--out", str(out), "--workers", "1"]) == 0
    (row,) = (row for row in json.loads((out / "results.json").read_text()) if row["method"] == "low-rank-4")
    assert row["iterations"] == 2
    assert 0 <= row["metrics"]["context"] <= 1
    report = (out / "report.md").read_text("utf-8")
    table = report.split("## Table 1: ")[1].split("\n## ")[0]
    assert "\n| LoRA of rank 4 | " in table
    assert "LoRA of rank 4" in (out / "report.html").read_text("utf-8")
    assert (out / "pictures" / "1.webp").is_file()
    settings = json.loads((out / "suite.json").read_text())["training low-rank-4"]
    assert (settings["lora_rank"], settings["iterations"]) == (4, 2)


def test_a_registered_baseline_can_be_selected_and_is_reported_as_missing_otherwise(extended, tmp_path):
    suite = suites.select(suites.MINIATURE, trainings=["low-rank-4"], seeds=1, development=False)
    assert bench.Cell("low-rank-4", suite.concepts[0], 0) in bench.cells_of(suite)
    assert group("low-rank-4") == "baseline"
    assert group("no-clip") == "variant"
    folder = tmp_path / "empty"
    suites._check_record(folder, suite)
    report, _ = suites.bench(folder, suite, workers=0, command="", log=pytest.fail)
    assert "LoRA of rank 4" in report.read_text("utf-8").split("Not run: ")[1]


def test_unknown_suites_are_refused_with_all_registered_names(extended, tmp_path, capsys):
    assert main(["bench", "--suite", "one-mag", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--suite is 'one-mag'; expected one of miniature, sweep, one-mug" in said
    assert "did you mean one-mug" in said
    assert not (tmp_path / "out").exists()


def test_names_of_shipped_parts_cannot_be_taken():
    with pytest.raises(InputError, match="training name 'lora' is taken"):
        methods.METHODS.register("lora", methods.METHODS["lora"])
    with pytest.raises(InputError, match="suite name 'sweep' is taken"):
        suites.SUITES.register("sweep", suites.SWEEP)


def test_the_sweeps_earlier_name_still_works(tmp_path, capsys):
    assert suites.suite_named("laboratory") is suites.suite_named("sweep") is suites.SWEEP
    suites._check_record(tmp_path, suites.SWEEP)
    suites._record_run(tmp_path, "echodistill bench --suite laboratory", 2)
    record = (tmp_path / "suite.json").read_bytes()
    assert main(["bench", "--suite", "laboratory", "--out", str(tmp_path), "--report"]) == 0
    assert main(["bench", "--suite", "sweep", "--out", str(tmp_path), "--report"]) == 0
    assert (tmp_path / "suite.json").read_bytes() == record
