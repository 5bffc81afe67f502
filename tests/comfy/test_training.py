"""Training nodes on a real server: results, progress, cancelling and resuming, and unchanged user models."""

from __future__ import annotations

import io
from pathlib import Path

import graphs
import pytest
import torch
from PIL import Image

from echodistill_core.adapter.file import read_adapter
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources, settings_for
from echodistill_core.settings import EchoSettings, TrainSettings
from echodistill_core.training import session

pytestmark = pytest.mark.usefixtures("server")
MINIATURE = ModelSources(family="miniature")


def silent(event):
    pass


def core_run(base: Path, folder: Path, **options):
    """A training by the core alone, on the files that the embedded family is loaded from."""
    options = {"class_noun": "mug", "preview_every": 0, "device": "cpu", **options}
    settings = settings_for(TrainSettings, options, MINIATURE)
    photographs = load_photographs(base / "input" / "mug")
    return session.train(photographs, open_family(MINIATURE), settings, MINIATURE, folder, silent)


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """Training and echo by the core, with the same settings as the nodes'."""
    run = core_run(base, tmp_path_factory.mktemp("reference") / "run", iterations=6)
    echo = settings_for(EchoSettings, {"iterations": 4, "pool_size": 4}, MINIATURE)
    return session.echo(run, open_family(MINIATURE), echo, silent)


def assert_equal(ours: Path, reference: Path):
    """Two adapters with bit-identical tensors, of the same base and settings."""
    here, there = read_adapter(ours), read_adapter(reference)
    assert torch.equal(here.token_embeddings, there.token_embeddings)
    assert here.deltas.keys() == there.deltas.keys()
    assert all(torch.equal(delta, there.deltas[name]) for name, delta in here.deltas.items())
    # base_model is the checkpoint's file name, which a socket does not contain.
    different = {name for name, value in here.metadata.items() if there.metadata[name] != value}
    assert different <= {"base_model"}


def runs(base: Path, noun: str = "mug") -> set[Path]:
    return {p for p in (base / "output" / "echodistill").glob(f"{noun}-*") if "-echo-" not in p.name}


@pytest.fixture(scope="module")
def trained(server, info, base):
    """One training of six iterations: its outcome and its folder."""
    before = runs(base)
    outcome = server.run(graphs.training(info))
    assert not outcome.error
    (folder,) = runs(base) - before
    return outcome, folder


def test_the_result_is_bit_identical_to_the_cores(trained, reference):
    for role in ("student", "teacher"):
        assert_equal(trained[1] / "distil" / f"{role}.safetensors", reference.path("distil", f"{role}.safetensors"))


def test_progress_previews_and_text_arrive(trained):
    outcome = trained[0]
    if any(message["type"] == "progress_state" for message in outcome.messages):
        states = [data["nodes"]["train"] for data in outcome.of("progress_state") if "train" in data["nodes"]]
        steps = [state["value"] for state in states if state["max"] == 6]
    else:
        steps = [data["value"] for data in outcome.of("progress")]
    assert max(steps) == 6
    assert len(outcome.previews) == 3  # every second of six iterations
    for preview in outcome.previews:
        assert Image.open(io.BytesIO(preview)).format == "JPEG"
    texts = outcome.texts_on("train")
    assert any("of 6" in text for text in texts)
    assert any("left" in text for text in texts)
    assert "teacher" in texts[-1]


def test_the_node_shows_its_samples(trained, server):
    images = trained[0].outputs["train"]["images"]
    assert len(images) == 3
    assert Image.open(io.BytesIO(server.picture(images[-1]))).size[0] > 4 * 64


def test_the_concept_shows_what_training_sees(trained):
    assert len(trained[0].outputs["concept"]["images"]) == 5
    (text,) = trained[0].texts_on("concept")
    assert "5 photographs of a <new1> mug (64x64)" in text


def test_the_same_inputs_return_the_finished_run(trained, server, info, base):
    before = runs(base)
    log = (trained[1] / "distil" / "log.jsonl").stat().st_mtime_ns
    # Equal inputs would hit ComfyUI's cache; checkpoint_every changes the inputs but not the run.
    outcome = server.run(graphs.training(info, checkpoint_every=50))
    assert not outcome.error
    assert "train" in outcome.ran
    assert runs(base) == before
    assert (trained[1] / "distil" / "log.jsonl").stat().st_mtime_ns == log


def test_cancel_saves_a_checkpoint_and_the_next_run_resumes_to_the_same_result(server, info, base):
    before = runs(base)
    cancelled = []

    def cancel(outcome):
        if not cancelled and any("train" in text for text in outcome.texts) and outcome.previews:
            cancelled.append(len(outcome.previews))
            server.post("interrupt", {})

    graph = graphs.training(info, iterations=40, seed=7, preview_every=1)
    outcome = server.run(graph, during=cancel)
    assert outcome.interrupted
    (folder,) = runs(base) - before
    assert (folder / "distil" / "checkpoint.safetensors").is_file()
    assert not (folder / "distil" / "student.safetensors").exists()
    steps = len((folder / "distil" / "log.jsonl").read_text().splitlines())
    assert cancelled[0] <= steps < 40
    last = outcome.texts_on("train")[-1]
    assert last == f"distil: cancelled at {steps} of 40, kept: Run goes on from there"

    resumed = server.run(graph)
    assert not resumed.error
    assert runs(base) - before == {folder}
    began = [text for text in resumed.texts_on("train") if "of 40" in text]
    assert began[0].startswith(f"distil: {steps + 1} of 40 (going on from {steps})")

    # Reference: an uninterrupted run of the core.
    whole = core_run(base, base / "whole", iterations=40, seed=7)
    assert_equal(folder / "distil" / "student.safetensors", whole.path("distil", "student.safetensors"))


def test_echo_equals_the_cores_own_and_leaves_the_run_alone(trained, server, info, reference):
    files = {p: p.read_bytes() for p in trained[1].rglob("*") if p.is_file()}
    graph = graphs.training(info)
    graph["echo"] = graphs.node(
        "EchoStage", trained=["train", 0], **{**graphs.unset(info, "EchoStage"), "iterations": 4, "pool_size": 4}
    )
    outcome = server.run(graph)
    assert not outcome.error
    assert len(outcome.outputs["echo"]["images"]) == 4  # the pool
    assert {p: p.read_bytes() for p in trained[1].rglob("*") if p.is_file()} == files
    (echoed,) = trained[1].parent.glob(f"{trained[1].name}-echo-*")
    for role in ("student", "teacher"):
        assert_equal(echoed / "echo" / f"{role}.safetensors", reference.path("echo", f"{role}.safetensors"))

    # Other settings create another echo next to the first.
    graph["echo"]["inputs"]["pool_size"] = 5
    assert not server.run(graph).error
    assert len(list(trained[1].parent.glob(f"{trained[1].name}-echo-*"))) == 2


def test_two_queued_trainings_do_not_disturb_each_other(server, info, base):
    """The first trains another toy, so that the second starts with models that were just in use."""
    before = runs(base)
    first = server.queue(graphs.training(info, "cat", "cat", iterations=5))
    second = server.queue(graphs.training(info, iterations=7))
    assert not first.wait().error
    assert not second.wait().error
    (folder,) = runs(base) - before
    alone = core_run(base, base / "alone", iterations=7)
    assert_equal(folder / "distil" / "student.safetensors", alone.path("distil", "student.safetensors"))


def test_training_leaves_the_users_models_as_they_were(server, info, base):
    """The same picture by stock nodes, before and after a training on the same MODEL, CLIP and VAE."""
    stock = graphs.stock_chain(["models", 0], ["models", 2], "photo of a mug on the beach", 1)
    before = server.run({"models": graphs.MINIATURE, **stock})
    graph = graphs.training(info, iterations=3, seed=11)
    assert not server.run(graph).error
    after = server.run(
        {
            "models": graphs.MINIATURE,
            **graphs.stock_chain(["models", 0], ["models", 2], "photo of a mug on the beach", 1, prefix="after"),
        }
    )
    assert not before.error
    assert not after.error
    assert torch.equal(graphs.saved_latent(base, "stock"), graphs.saved_latent(base, "after"))


def test_a_killed_server_finds_its_finished_run(comfyui, base, info, trained, tmp_path):
    from comfy_server import Server

    second = Server(comfyui, base, tmp_path / "log.txt").start()
    try:
        log = (trained[1] / "distil" / "log.jsonl").stat().st_mtime_ns
        outcome = second.run(graphs.training(info))
        assert not outcome.error
        assert "train" in outcome.ran
        assert (trained[1] / "distil" / "log.jsonl").stat().st_mtime_ns == log
    finally:
        second.kill()


def test_memory_does_not_grow_over_ten_rounds(server, info):
    sizes = []
    for i in range(10):
        graph = graphs.training(info, iterations=2, seed=100 + i)
        outcome = server.run({**graph, **graphs.sampled(info, ["train", 1], seed=i)})
        assert not outcome.error
        sizes.append(server.memory())
    # The first rounds fill allocators and caches. A leaked family would add 40 MB per round.
    assert sizes[-1] - sizes[4] < 60e6, [round(size / 1e6) for size in sizes]
