"""The benchmark of a training iteration at small size: it measures every part of an iteration, and resumes."""

import json
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import benchmarks.__main__ as everything
from benchmarks import counted, measure, memory, sample, scaling, train_step


@pytest.fixture
def once(monkeypatch):
    """Every piece of work twice: figures without a meaning, in little time."""
    given = measure.cost
    monkeypatch.setattr(train_step, "cost", lambda work, device: given(work, device, 1, 1))
    monkeypatch.setattr(train_step, "matrix_ceiling", lambda device, dtype: measure.matrix_ceiling(device, dtype, 64))


def test_parts_make_up_the_iteration_and_a_second_run_measures_nothing(once, tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    command = ["--modes", "paper", "--out", str(out)]
    assert train_step.main(command) == 0
    printed = capsys.readouterr().out
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]

    whole = cells["paper"]["flop"]
    # Each part once, but for the text, which is read twice: as the teacher learns it, and as both read it after that.
    parts = cells["paper"]["parts"]
    split = sum(cell["flop"] for cell in parts.values())
    assert split == pytest.approx(whole, rel=0.05)
    # Nothing is reused there: each critic encodes the student's image once more, and CLIP a third time.
    again = [parts[f"{role} of photographs"]["flop"] for role in ("dino", "dinov2", "clip", "clip")]
    assert cells["plain"]["flop"] - whole >= sum(again)

    monkeypatch.setattr(train_step, "cost", lambda *arguments: pytest.fail("it was measured already"))
    assert train_step.main(command) == 0
    assert capsys.readouterr().out == printed
    assert train_step.main([*command, "--resolution", "128"]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_measurements_in_turns_share_slow_minutes(monkeypatch, capsys):
    """Each round runs plain and the mode once; the ratio is the rounds' median, which one slow round does not move."""
    rounds = iter([(1.0, 1.0)] * train_step.WARM_UP + [(0.4, 0.2), (4.0, 2.0), (0.4, 0.2)])
    seconds = iter([s for pair in rounds for s in pair])
    monkeypatch.setattr(train_step, "cost", lambda *arguments: measure.Cost(next(seconds), 0, 0, None, 0))
    monkeypatch.setitem(train_step.MODES, "low", {"image_every": 2})  # whose rounds are of two iterations
    assert train_step.main(["--alternate", "3", "--modes", "low"]) == 0
    plain, low = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert plain == ["plain", "400.0", "400.0", "1.00", "1.00"]
    assert low == ["low", "100.0", "100.0", "4.00", "4.00"]
    assert next(seconds, None) is None


def test_operations_are_counted_as_they_are_by_hand():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    found = measure.cost(lambda: a @ b, torch.device("cpu"), 1, 3)
    assert found.flop == 2 * 3 * 5 * 7
    assert found.fastest <= found.seconds <= found.slowest
    assert found.each(3).flop == 2 * 5 * 7
    assert found.each(3).seconds == found.seconds / 3


def test_a_table_lines_up():
    assert measure.table(["what", "ms"], [["a", 1], ["longer", 100]]) == (
        "what     ms\n-----------\na         1\nlonger  100"
    )


def test_the_memory_of_a_mode_is_reported(capsys):
    assert memory.main(["--modes", "low"], isolated=False) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "low"
    assert 0 < float(row[1]) <= float(row[2])


def test_every_axis_of_scaling_is_measured(once, monkeypatch, capsys):
    """Twice the images are twice the counted work, and more photographs none."""
    monkeypatch.setattr(scaling, "cost", lambda work, device: measure.cost(work, device, 1, 1))
    for name, values in (("ITERATIONS", (1,)), ("PHOTOGRAPHS", (1, 2)), ("BATCHES", (1, 2)), ("ADAPTERS", (2,))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setitem(scaling.SIDES, "tiny", (32, 64))
    kept = []
    monkeypatch.setattr(scaling, "report", lambda figures, *rest: kept.append(figures.record["cells"]) or "")
    assert scaling.main([]) == 0
    (cells,) = kept
    values = {"iterations": (1,), "photographs": (1, 2), "batch": (1, 2), "resolution": (32, 64), "adapters": (2,)}
    assert set(cells) == {f"{axis} {n}" for axis, measured in values.items() for n in measured}
    assert cells["batch 2"]["flop"] == pytest.approx(2 * cells["batch 1"]["flop"], rel=0.02)
    assert cells["photographs 2"]["flop"] == cells["photographs 1"]["flop"]
    assert cells["resolution 64"]["flop"] > 2 * cells["resolution 32"]["flop"]


def test_memory_is_counted_as_it_is_by_hand():
    """Made, freed, seen through a view, set apart; rounded up to blocks of 512 bytes."""
    with FakeTensorMode(), counted.Live() as live:
        a = torch.empty(1000, dtype=torch.float32)
        assert live.now == live.peak == 4096
        b = a[:10] + 1
        assert live.now == 4096 + 512
        view = a.view(10, 100)
        del a
        assert live.now == 4096 + 512
        del view
        assert (live.now, live.peak) == (512, 4096 + 512)
        live.set_apart(b)
        assert live.now == 0
        del b
        assert live.now == 0


def test_memory_and_operations_are_counted_in_each_mode():
    """Against the operations of a real iteration. It runs without a number to read back, so nobody waits for a device.

    One image and one critic, since counting takes half a millisecond for every operation.
    """
    device = torch.device("cpu")
    fewer = {"batch_size": 1, "dinov2_weight": 0.0, "clip_weight": 0.0, "identity_weight": 0.0}
    bench = train_step.Workbench("tiny", device)
    normal, low = (bench.settings(memory_mode=mode, **fewer) for mode in ("normal", "low"))
    real = measure.cost(train_step.iteration(bench.state(normal), bench), device, 1, 1).flop
    paper, less = counted.count(normal, "tiny"), counted.count(low, "tiny")
    assert sum(paper.flop.values()) == pytest.approx(real, rel=0.01)
    assert max(less.peak.values()) < 0.8 * max(paper.peak.values())
    assert less.weights < paper.weights  # one UNet is elsewhere
    # One pass of the student and one of the decoder more, and the same otherwise.
    assert 1.05 < sum(less.flop.values()) / sum(paper.flop.values()) < 1.35
    assert less.flop["teacher"] == paper.flop["teacher"]
    # Of two iterations, one computes image losses and the other only the latent loss.
    blind = bench.settings(**fewer, swd_weight=0.0, adversarial_weight=0.0)
    between = measure.cost(train_step.iteration(bench.state(blind), bench), device, 1, 1).flop
    turns = counted.count(bench.settings(**fewer, image_every=2), "tiny")
    assert sum(turns.flop.values()) == pytest.approx((real + between) / 2, rel=0.01)


def test_counts_are_reported_and_saved(capsys, tmp_path, monkeypatch):
    found = counted.Counted(
        2**30, {"teacher": 2**31, "student": 3 * 2**30, "critics": 2**30}, {"teacher": 1, "student": 2}
    )
    monkeypatch.setattr(memory, "count", lambda settings, scale: found)
    command = ["--counted", "--modes", "low", "--out", str(tmp_path / "figures.json")]
    assert memory.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].split() == ["low", "1.00", "2.00", "3.00", "1.00", "3e-12"]
    monkeypatch.setattr(memory, "count", lambda *arguments: pytest.fail("it was counted already"))
    assert memory.main(command) == 0
    assert capsys.readouterr().out == printed
    assert memory.main(["--modes", "low", "--out", str(tmp_path / "figures.json")]) == 1  # measured, not counted
    assert "give another --out" in capsys.readouterr().err


def test_reading_a_number_back_would_be_seen_in_counting():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.randn(3).sum())


def test_one_command_runs_every_benchmark_and_reports_failures(monkeypatch, tmp_path):
    called = {}

    def run(name, ending, given):
        called[name] = given
        if isinstance(ending, Exception):
            raise ending
        return ending

    for module, ending in ((train_step, torch.OutOfMemoryError()), (sample, 1), (memory, 0), (scaling, 0)):
        monkeypatch.setattr(module, "main", partial(run, module.__name__, ending))
    assert everything.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert list(called) == [f"benchmarks.{name}" for name in ("train_step", "sample", "memory", "scaling")]
    for name, arguments in called.items():
        out = str(tmp_path / f"{name.removeprefix('benchmarks.')}.json")
        assert arguments == ["--scale", "tiny", "--device", "cpu", "--out", out]
