"""The echoing stage: its pool, what it carries on, and what it refuses."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.errors import InputError
from echodistill_core.models.sources import ModelSources
from echodistill_core.sampling import sample
from echodistill_core.settings import EchoSettings
from echodistill_core.tensorfile import read_tensors
from echodistill_core.training import loop, session
from echodistill_core.training.echo import POOL_SEED, pool_prompts
from echodistill_core.training.events import PoolProgress, StepDone
from echodistill_core.training.run import open_run


def silent(event):
    pass


def files(run, stage="distil"):
    return {p.name: p.read_bytes() for p in sorted(run.path(stage).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(train_tiny, tmp_path_factory):
    """A finished run whose student and critics have moved far enough to be told from fresh ones. Copy before use."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train_tiny(folder, iterations=3, student_lr=1e-3, critic_lr=1e-3, seed=11).folder


@pytest.fixture
def copy_of(trained, tmp_path):
    """A copy of the finished run, open."""
    import shutil

    return open_run(shutil.copytree(trained, tmp_path / "copy"))


def test_the_pool_is_what_the_finished_student_makes(copy_of, tiny_family):
    events = []
    before = files(copy_of)
    run = session.echo(copy_of, tiny_family(), EchoSettings(iterations=1, pool_size=22), events.append)
    assert [(e.done, e.size) for e in events if isinstance(e, PoolProgress)] == [(i, 22) for i in range(1, 23)]
    names = sorted(p.name for p in run.path("echo", "pool").glob("*.png"))
    assert names == [f"{i:03d}.png" for i in range(22)]
    record = json.loads(run.path("echo", "pool", "pool.json").read_text(encoding="utf-8"))
    assert record["prompts"] == list(pool_prompts(run.settings, EchoSettings(pool_size=22)))
    assert record["prompts"][:2] == ["photo of a <new1> dog", "photo of the <new1> dog"]
    assert record["prompts"][20] == record["prompts"][0]
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    with personalised(tiny_family(), [adapter]) as model:
        for i in (0, 1, 7, 20, 21):
            expected = sample(model, [record["prompts"][i]], seed=11 + POOL_SEED + i)[0]
            with Image.open(run.path("echo", "pool", names[i])) as picture:
                stored = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert ((expected + 1) * 127.5 - stored).abs().max().item() < 0.51
    # Both stages' adapters are kept, and those of before are the files they were.
    assert files(run) == before
    echoed = files(run, "echo")
    assert set(echoed) == set(before)
    assert all(echoed[name] != before[name] for name in before)
    assert read_adapter(run.path("echo", "student.safetensors")).metadata["stage"] == "echo"
    assert run.is_finished("distil")
    assert run.is_finished("echo")


def test_an_echo_is_found_finished_and_repeats(copy_of, tiny_family, trained, tmp_path):
    import shutil

    other = open_run(shutil.copytree(trained, tmp_path / "other"))
    settings = EchoSettings(iterations=2, pool_size=2)
    first = files(session.echo(copy_of, tiny_family(), settings, silent), "echo")
    assert files(session.echo(other, tiny_family(), settings, silent), "echo") == first
    events = []
    session.echo(copy_of, tiny_family(), settings, events.append)
    assert events == []
    assert files(copy_of, "echo") == first


def started(monkeypatch, run, family, settings):
    """What an echo begins with: its state before the first iteration, and where its images come from."""
    found = {}

    def keep(state, run, stage, source, iterations, listen):
        found.update(
            source=source,
            step=state.step,
            iterations=iterations,
            tensors={n: t.clone() for n, t in state.trainables.tensors().items()},
            moments={n: len(o.state) for n, o in state.trainables.optimizers.items()},
            steps={int(m["step"]) for o in state.trainables.optimizers.values() for m in o.state.values()},
            exp_avg={
                f"optimizers/{name}/{i}/exp_avg": m["exp_avg"].clone()
                for name, o in state.trainables.optimizers.items()
                for i, m in o.state_dict()["state"].items()
            },
            generators={n: g.get_state() for n, g in state.random.generators.items()},
        )

    monkeypatch.setattr(session, "train_stage", keep)
    session.echo(run, family, settings, silent)
    return found


@pytest.mark.parametrize("optimizers", [True, False])
@pytest.mark.parametrize("critics", [True, False])
def test_what_an_echo_carries_on(copy_of, tiny_family, tiny_state, monkeypatch, optimizers, critics):
    checkpoint = read_tensors(copy_of.path("distil", "checkpoint.safetensors"))
    settings = EchoSettings(iterations=7, pool_size=1, carry_optimizers=optimizers, carry_critics=critics)
    found = started(monkeypatch, copy_of, tiny_family(), settings)
    assert (found["step"], found["iterations"]) == (0, 7)
    fresh = {n: t for n, t in tiny_state(seed=11).trainables.tensors().items() if n.startswith("critics/")}
    for name, tensor in found["tensors"].items():
        carried = critics or not name.startswith("critics/")
        assert torch.equal(tensor, checkpoint[name] if carried else fresh[name]), name
        if name in fresh:
            assert not torch.equal(checkpoint[name], fresh[name])
    # 14 matrices and the token, 14 matrices, and 3 heads of 4 tensors. New heads have no moments to go on with.
    moments = {"teacher": 15, "student": 14, "critics": 12 if critics else 0} if optimizers else {}
    assert {n: count for n, count in found["moments"].items() if count} == {n: c for n, c in moments.items() if c}
    assert found["steps"] == ({3} if optimizers else set())
    for name, expected in found["exp_avg"].items():
        assert torch.equal(checkpoint[name], expected), name
    for name, state in found["generators"].items():
        assert torch.equal(state, checkpoint[f"generators/{name}"])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_echos_images_come_from_the_pool_or_the_photographs(copy_of, tiny_family, monkeypatch, share):
    settings = EchoSettings(pool_size=2, prompts="a <new1> dog|the <new1> dog in snow", real_share=share)
    found = started(monkeypatch, copy_of, tiny_family(), settings)
    drawn, item = set(), type(found["source"])._item

    def keep(self, images, index):
        place, text = item(self, images, index)
        drawn.add((images.pixels[place].numpy().tobytes(), text))
        return place, text

    monkeypatch.setattr(type(found["source"]), "_item", keep)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        found["source"].draw(step, generator)
    folder, count = (copy_of.path("echo", "pool"), 2) if share == 0 else (copy_of.folder / "photographs", 3)
    expected = set()
    for i in range(count):
        with Image.open(folder / f"{i:03d}.png") as picture:
            expected.add(np.ascontiguousarray(np.array(picture).transpose(2, 0, 1)).tobytes())
    assert {pixels for pixels, _ in drawn} == expected
    texts = {text for _, text in drawn}
    if share == 0:
        assert texts == {"a <new1> dog", "the <new1> dog in snow"}
    else:
        assert all("<new1> dog" in text and "snow" not in text for text in texts)
        assert len(texts) > 5


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prompts_without_the_placeholder_are_refused_before_anything(copy_of, tiny_family, monkeypatch):
    before = everything(copy_of.folder)
    monkeypatch.setattr(session, "load_backbones", lambda *args: pytest.fail("something was loaded"))
    with pytest.raises(InputError, match="'a dog' does not contain the placeholder <new1>"):
        session.echo(copy_of, tiny_family(), EchoSettings(prompts="a <new1> dog | a dog", pool_size=1), silent)
    assert everything(copy_of.folder) == before


def test_prompts_are_separated_by_bars_and_taken_in_turn(quick_settings):
    prompts = pool_prompts(quick_settings(), EchoSettings(prompts=" a <new1> | b <new1>||", pool_size=5))
    assert prompts == ("a <new1>", "b <new1>", "a <new1>", "b <new1>", "a <new1>")


def test_an_echo_of_an_unfinished_run_is_refused(train_tiny, tiny_family, tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", listen=stop)
    run = open_run(tmp_path / "run")
    with pytest.raises(InputError, match="is not trained to its end"):
        session.echo(run, tiny_family(), EchoSettings(), silent)
    assert not run.path("echo").exists()


def test_an_echo_with_other_models_is_refused(copy_of, tiny_family):
    before, family = everything(copy_of.folder), tiny_family()
    other = replace(family, teacher=replace(family.teacher, fingerprint="0" * 16))
    with pytest.raises(InputError, match=r"was trained on other models: teacher is .* there and '0{16}"):
        session.echo(copy_of, other, EchoSettings(), silent)
    schedule = replace(family.student.schedule, prediction_type="v_prediction")
    other = replace(family, student=replace(family.student, schedule=schedule))
    with pytest.raises(InputError, match=r"was trained on other models: student is"):
        session.echo(copy_of, other, EchoSettings(), silent)
    assert everything(copy_of.folder) == before


def test_an_echo_with_other_settings_is_refused(copy_of, tiny_family):
    session.echo(copy_of, tiny_family(), EchoSettings(iterations=1, pool_size=1), silent)
    before = everything(copy_of.folder)
    with pytest.raises(InputError, match="other settings: pool_size is 1 there and 2 here"):
        session.echo(copy_of, tiny_family(), EchoSettings(iterations=1, pool_size=2), silent)
    assert everything(copy_of.folder) == before


def test_an_echo_without_the_checkpoint_is_refused(copy_of, tiny_family):
    copy_of.path("distil", "checkpoint.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is missing"):
        session.echo(copy_of, tiny_family(), EchoSettings(pool_size=1), silent)


def test_a_stopped_echo_goes_on_to_the_same_end(copy_of, tiny_family, trained, tmp_path):
    import shutil

    other = open_run(shutil.copytree(trained, tmp_path / "other"))
    settings = EchoSettings(iterations=3, pool_size=3, carry_critics=False, carry_optimizers=False)
    whole = files(session.echo(other, tiny_family(), settings, silent), "echo")
    for stop_at in (PoolProgress(2, 3), 1, 2):

        def stop(event, stop_at=stop_at):
            if event == stop_at or (isinstance(event, StepDone) and event.step == stop_at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.echo(copy_of, tiny_family(), settings, stop)
    assert files(session.echo(copy_of, tiny_family(), settings, silent), "echo") == whole


def test_settings_of_a_run_are_those_it_was_trained_with(trained, quick_settings):
    run = open_run(trained)
    expected = quick_settings(iterations=3, student_lr=1e-3, critic_lr=1e-3, seed=11)
    assert dataclasses.asdict(run.settings) == dataclasses.asdict(expected)
    assert run.sources == ModelSources(family="tiny")
    assert loop.TEMPLATES[0] == "photo of a {}"
