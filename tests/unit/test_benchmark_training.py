"""The training benchmarks at tiny scale: the parts cover an iteration, and an interrupted run continues."""

import json
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import benchmarks.__main__ as all_benchmarks
from benchmarks import counted, measure, memory, sample, scaling, train_step
from benchmarks.random_models import RandomModels


@pytest.fixture
def two_calls(monkeypatch):
    """Measure with one warm-up call and one repeat: little time, and no meaningful timings."""
    original = measure.cost
    monkeypatch.setattr(train_step, "cost", lambda work, device: original(work, device, 1, 1))
    throughput = measure.matmul_throughput
    monkeypatch.setattr(train_step, "matmul_throughput", lambda device, dtype: throughput(device, dtype, 64))


def test_parts_make_up_the_iteration_and_a_second_run_measures_nothing(two_calls, tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    command = ["--modes", "paper", "--out", str(out)]
    assert train_step.main(command) == 0
    printed = capsys.readouterr().out
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]

    whole = cells["paper"]["flop"]
    # Each part runs once, except the text encoder: once for the teacher's step, once for the student's.
    parts = cells["paper"]["parts"]
    assert sum(cell["flop"] for cell in parts.values()) == pytest.approx(whole, rel=0.05)
    # The literal implementation recomputes the student image's features for each critic, and CLIP's a third time.
    recomputed = [parts[f"{role} of photographs"]["flop"] for role in ("dino", "dinov2", "clip", "clip")]
    assert cells["plain"]["flop"] - whole >= sum(recomputed)

    monkeypatch.setattr(train_step, "cost", lambda *arguments: pytest.fail("a stored cell was measured again"))
    assert train_step.main(command) == 0
    assert capsys.readouterr().out == printed
    assert train_step.main([*command, "--resolution", "128"]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_alternation_compares_versions_within_each_round(monkeypatch, capsys):
    """Each round runs "plain" and the mode. The speed-up is the rounds' median, so one slow round has no effect."""
    rounds = iter([(1.0, 1.0)] * train_step.WARM_UP + [(0.4, 0.2), (4.0, 2.0), (0.4, 0.2)])
    seconds = iter([s for pair in rounds for s in pair])
    monkeypatch.setattr(train_step, "cost", lambda *arguments: measure.Cost(next(seconds), 0, 0, None, 0))
    monkeypatch.setitem(train_step.MODES, "low", {"image_every": 2})  # a round of this mode is two iterations
    assert train_step.main(["--alternate", "3", "--modes", "low"]) == 0
    plain, low = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert plain == ["plain", "400.0", "400.0", "1.00", "1.00"]
    assert low == ["low", "100.0", "100.0", "4.00", "4.00"]
    assert next(seconds, None) is None


def test_operations_of_a_matrix_product():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    cost = measure.cost(lambda: a @ b, torch.device("cpu"), 1, 3)
    assert cost.flop == 2 * 3 * 5 * 7
    assert cost.fastest <= cost.seconds <= cost.slowest
    assert cost.per_iteration(3).flop == 2 * 5 * 7
    assert cost.per_iteration(3).seconds == cost.seconds / 3


def test_table_columns_are_aligned():
    assert measure.table(["what", "ms"], [["a", 1], ["longer", 100]]) == (
        "what     ms\n-----------\na         1\nlonger  100"
    )


def test_memory_of_a_mode_is_measured(capsys):
    assert memory.main(["--modes", "low"], isolated=False) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "low"
    assert 0 < float(row[1]) <= float(row[2])


def test_every_axis_of_scaling_is_measured(two_calls, monkeypatch, capsys):
    """Operations grow with the batch size and not with the number of photographs."""
    monkeypatch.setattr(scaling, "cost", lambda work, device: measure.cost(work, device, 1, 1))
    for name, values in (("ITERATIONS", (1,)), ("PHOTOGRAPHS", (1, 2)), ("BATCHES", (1, 2)), ("ADAPTERS", (2,))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setitem(scaling.SIDES, "tiny", (32, 64))
    reported = []
    monkeypatch.setattr(scaling, "report", lambda figures, *rest: reported.append(figures.record["cells"]) or "")
    assert scaling.main([]) == 0
    (cells,) = reported
    values = {"iterations": (1,), "photographs": (1, 2), "batch": (1, 2), "resolution": (32, 64), "adapters": (2,)}
    assert set(cells) == {f"{axis} {n}" for axis, measured in values.items() for n in measured}
    assert cells["batch 2"]["flop"] == pytest.approx(2 * cells["batch 1"]["flop"], rel=0.02)
    assert cells["photographs 2"]["flop"] == cells["photographs 1"]["flop"]
    assert cells["resolution 64"]["flop"] > 2 * cells["resolution 32"]["flop"]


def test_live_memory_of_known_tensors():
    """Allocation, a view, release and exclusion, in blocks of 512 bytes."""
    with FakeTensorMode(), counted.LiveMemoryCounter() as live:
        a = torch.empty(1000, dtype=torch.float32)
        assert live.current == live.peak == 4096
        b = a[:10] + 1
        assert live.current == 4096 + 512
        view = a.view(10, 100)
        del a
        assert live.current == 4096 + 512
        del view
        assert (live.current, live.peak) == (512, 4096 + 512)
        live.exclude(b)
        assert live.current == 0
        del b
        assert live.current == 0


def test_memory_and_operations_are_counted_in_each_mode():
    """Counted operations equal those of a real iteration, and no value is read back from the device.

    One image and one critic, since counting takes half a millisecond per operation.
    """
    device = torch.device("cpu")
    fewer = {"batch_size": 1, "dinov2_weight": 0.0, "clip_weight": 0.0, "identity_weight": 0.0}
    models = RandomModels("tiny", device)
    normal, low = (models.settings(memory_mode=mode, **fewer) for mode in ("normal", "low"))
    real = measure.cost(train_step.iteration(models.state(normal), models), device, 1, 1).flop
    paper, less = counted.count_iteration(normal, "tiny"), counted.count_iteration(low, "tiny")
    assert sum(paper.flop.values()) == pytest.approx(real, rel=0.01)
    assert max(less.peak.values()) < 0.8 * max(paper.peak.values())
    assert less.weights < paper.weights  # one UNet is in host memory
    # Low memory mode adds one pass of the student and one of the decoder.
    assert 1.05 < sum(less.flop.values()) / sum(paper.flop.values()) < 1.35
    assert less.flop["teacher"] == paper.flop["teacher"]
    # With image_every 2, every second iteration has no image losses.
    without_images = models.settings(**fewer, swd_weight=0.0, adversarial_weight=0.0)
    latents_only = measure.cost(train_step.iteration(models.state(without_images), models), device, 1, 1).flop
    alternating = counted.count_iteration(models.settings(**fewer, image_every=2), "tiny")
    assert sum(alternating.flop.values()) == pytest.approx((real + latents_only) / 2, rel=0.01)


def test_counted_figures_are_printed_and_stored(capsys, tmp_path, monkeypatch):
    figures = counted.CountedIteration(
        2**30, {"teacher": 2**31, "student": 3 * 2**30, "critics": 2**30}, {"teacher": 1, "student": 2}
    )
    monkeypatch.setattr(memory, "count_iteration", lambda settings, scale: figures)
    command = ["--counted", "--modes", "low", "--out", str(tmp_path / "figures.json")]
    assert memory.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].split() == ["low", "1.00", "2.00", "3.00", "1.00", "3e-12"]
    monkeypatch.setattr(memory, "count_iteration", lambda *arguments: pytest.fail("a stored cell was counted again"))
    assert memory.main(command) == 0
    assert capsys.readouterr().out == printed
    assert memory.main(["--modes", "low", "--out", str(tmp_path / "figures.json")]) == 1  # a file of counted figures
    assert "give another --out" in capsys.readouterr().err


def test_counting_fails_where_a_value_is_read_back():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.randn(3).sum())


def test_one_command_runs_every_benchmark_even_if_one_fails(monkeypatch, tmp_path):
    called = {}

    def run(name, outcome, arguments):
        called[name] = arguments
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for module, outcome in ((train_step, torch.OutOfMemoryError()), (sample, 1), (memory, 0), (scaling, 0)):
        monkeypatch.setattr(module, "main", partial(run, module.__name__, outcome))
    assert all_benchmarks.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert list(called) == [f"benchmarks.{name}" for name in ("train_step", "sample", "memory", "scaling")]
    for name, arguments in called.items():
        out = str(tmp_path / f"{name.removeprefix('benchmarks.')}.json")
        assert arguments == ["--scale", "tiny", "--device", "cpu", "--out", out]
