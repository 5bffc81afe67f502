"""A run's plots of losses take their small share of the time, and the last one is always drawn."""

from pathlib import Path

import pytest

from echodistill_core import reporting
from echodistill_core.reporting import RunPictures
from echodistill_core.training.events import CheckpointSaved, StepDone


@pytest.mark.parametrize(("iteration_seconds", "plot_seconds"), [(0.085, 1.5), (0.6, 1.5), (30.0, 1.5), (0.01, 0.0)])
def test_plots_take_at_most_their_share_of_a_long_run(tmp_path, monkeypatch, iteration_seconds, plot_seconds):
    clock, drawn = [0.0], []

    def plot(rows, path, title):
        drawn.append(clock[0])
        clock[0] += plot_seconds

    monkeypatch.setattr(reporting, "plot_losses", plot)
    monkeypatch.setattr(reporting.time, "monotonic", lambda: clock[0])
    listen = RunPictures(tmp_path)
    steps, every = 5000, 100
    for step in range(1, steps + 1):
        clock[0] += iteration_seconds
        listen(StepDone("distil", step, steps, {}))
        if step % every == 0:
            listen(CheckpointSaved("distil", step, Path("checkpoint.safetensors")))
    total = steps * iteration_seconds
    # The first and the last are drawn whatever they cost.
    assert (len(drawn) - 2) * plot_seconds <= RunPictures.SHARE * total
    assert drawn[-1] == clock[0] - plot_seconds
    if plot_seconds / RunPictures.SHARE < every * iteration_seconds:
        assert len(drawn) == steps // every
