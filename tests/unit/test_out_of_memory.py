"""Memory that runs out: what a user is told, that the run goes on, and that it then ends as if nothing had happened."""

import pytest
import torch

from echodistill_core.errors import EchoDistillError
from echodistill_core.settings import TrainSettings
from echodistill_core.training import steps
from echodistill_core.training.events import StepDone
from echodistill_core.training.memory import OutOfMemoryError, activation_bytes, advice

ALLOCATORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ALLOCATORS, ids=["cuda", "mps", "cpu", "cublas", "python"])
def test_a_run_that_ran_out_of_memory_says_what_fits_and_goes_on_with_it(tmp_path, train_tiny, monkeypatch, error):
    step = steps.student_step

    def run_out(state, batch):
        if state.step == 3:
            raise error
        return step(state, batch)

    monkeypatch.setattr(steps, "student_step", run_out)
    common = {"iterations": 4, "checkpoint_every": 2, "batch_size": 2}
    with pytest.raises(OutOfMemoryError, match="goes on from its last checkpoint, with memory_mode low") as caught:
        train_tiny(tmp_path / "run", **common)
    # ComfyUI frees its models when it sees torch's, and the command line prints ours.
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert isinstance(caught.value, EchoDistillError)
    assert "more lines" not in str(caught.value)
    monkeypatch.setattr(steps, "student_step", step)
    done = []
    run = train_tiny(
        tmp_path / "run", memory_mode="low", listen=lambda e: isinstance(e, StepDone) and done.append(e.step), **common
    )
    assert run.is_finished("distil")
    assert done == [3, 4]


def test_other_errors_pass_unchanged(tmp_path, train_tiny, monkeypatch):
    def broken(state, batch):
        raise RuntimeError("a size does not match")

    monkeypatch.setattr(steps, "student_step", broken)
    with pytest.raises(RuntimeError, match=r"^a size does not match$"):
        train_tiny(tmp_path / "run")


def test_advice_names_only_what_is_not_set_yet():
    plenty = advice(TrainSettings())
    fits = "memory_mode low (about 6 GB for Stable Diffusion at 512 pixels in bf16, in place of 15)"
    for part in (fits, "precision bf16", "dinov2-small", "batch_size 1"):
        assert part in plenty
    least = advice(TrainSettings(memory_mode="low", precision="bf16", dinov2_backbone="dinov2-small", batch_size=1))
    assert least == (
        "the same run goes on from its last checkpoint, with other programs closed; a new run needs less with "
        "a smaller resolution."
    )


def test_activations_grow_with_images_and_area_unless_memory_is_low():
    normal, low = TrainSettings(precision="bf16"), TrainSettings(precision="bf16", memory_mode="low")
    assert activation_bytes(normal, 512) == 2 * activation_bytes(TrainSettings(precision="bf16", batch_size=1), 512)
    assert activation_bytes(normal, 512) == pytest.approx(4 * activation_bytes(normal, 256), rel=1e-6)
    assert activation_bytes(low, 512) == activation_bytes(
        TrainSettings(precision="bf16", memory_mode="low", batch_size=1), 512
    )
    assert activation_bytes(TrainSettings(), 512) == pytest.approx(2 * activation_bytes(normal, 512), rel=1e-6)
