"""The benchmark of a training iteration in small: it covers the iteration, and goes on where it stopped."""

import json

import pytest
import torch

from benchmarks import measure, memory, scaling, train_step


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
    # Each part once, but for the text: the teacher's, the student's, and what the alignment reads, without gradients.
    split = sum(cell["flop"] for name, cell in cells.items() if name.startswith("paper: "))
    assert split == pytest.approx(whole, rel=0.05)
    # Nothing is reused there: each critic looks once more at the student's image, and CLIP a third time.
    again = [cells[f"paper: {role} of photographs"]["flop"] for role in ("dino", "dinov2", "clip", "clip")]
    assert cells["plain"]["flop"] - whole >= sum(again)

    monkeypatch.setattr(train_step, "cost", lambda *arguments: pytest.fail("it was measured already"))
    assert train_step.main(command) == 0
    assert capsys.readouterr().out == printed
    assert train_step.main([*command, "--resolution", "128"]) == 1
    assert "give another --out" in capsys.readouterr().err


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


def test_memory_of_a_mode_is_told(capsys):
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
