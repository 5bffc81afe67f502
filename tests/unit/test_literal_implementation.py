"""Iterations in every configuration agree with the literal implementation of Algorithm 1 (benchmarks/literal.py)."""

import pytest
import torch

from benchmarks.literal import LiteralImplementation
from echodistill_core.concept.images import square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.architectures import TINY
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.perception.load import load_backbones
from echodistill_core.training import build
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.steps import iterate, teacher_step

# Settings, and whether the device counts as one with its own memory, so that idle UNets are offloaded.
CONFIGURATIONS = {
    "normal": ({}, False),
    "low": ({"memory_mode": "low"}, False),
    "low, one UNet at a time": ({"memory_mode": "low"}, True),
    "repeated views": ({"augment": False}, False),
    "repeated views, low": ({"augment": False, "memory_mode": "low"}, False),
}


def literal_from(state):
    return LiteralImplementation(
        state.settings,
        TINY,
        {role: tiny_checkpoint(role) for role in ("teacher", "student")},
        load_backbones({"dino": "dino", "dinov2": "dinov2", "clip": "clip"}, "tiny"),
        lambda prompt: state.family.text.tokenize([prompt])[0].tolist(),
        state.trainables.critics,
    )


def pairs(state, literal):
    """(package's tensor, literal implementation's tensor) for each trained tensor, by optimiser."""
    by_optimizer = {
        role: [
            (state.trainables.weights[role].parameters[n], p)
            for n, p in zip(literal.kv_names, literal.kv[role], strict=True)
        ]
        for role in ("teacher", "student")
    }
    by_optimizer["teacher"].append((state.trainables.token_embeddings["teacher"], literal.token_embedding))
    by_optimizer["critics"] = [
        pair
        for r in state.trainables.critics
        for pair in zip(state.trainables.critics[r].parameters(), literal.heads[r].parameters(), strict=True)
    ]
    return by_optimizer


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_iterations_agree_with_the_literal_implementation(tiny_state, photographs, monkeypatch, configuration):
    options, own_memory = CONFIGURATIONS[configuration]
    if own_memory:
        monkeypatch.setattr(build, "ONE_MEMORY", ())
    state = tiny_state(batch_size=2, seed=4, **options)
    literal = literal_from(state)
    images = square_images(load_photographs(photographs), 64, "center")
    sources = [TrainingImages(images, state.settings, 8) for _ in range(2)]
    torch.testing.assert_close(state.trainables.token_embeddings["teacher"].data, literal.token_embedding.data)
    start = literal.token_embedding.detach().clone()
    for step in range(2):
        state.step = step
        actual = iterate(state, sources[0].draw(step, state.random.generators["data"]))
        expected = literal.iterate(sources[1].draw(step, literal.data_generator))
        assert actual.keys() == expected.keys()
        for name in actual:
            # The one-step map multiplies rounding errors of gradients by 14.6.
            tolerance = 1e-4 if name.startswith("grad_norm_") else 1e-5
            torch.testing.assert_close(
                actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        if step == 0:
            # After one step AdamW's first moments are a tenth of the gradient.
            for player, tensors in pairs(state, literal).items():
                ours, theirs = state.trainables.optimizers[player].state, literal.optimizers[player].state
                for own, reference in tensors:
                    gradient, truth = (s[p]["exp_avg"] for s, p in ((ours, own), (theirs, reference)))
                    assert ((gradient - truth).norm() / truth.norm()).item() < 1e-4, player
    # AdamW moves every weight by about its learning rate, here 1e-5 and 2e-5. A weight whose gradient is only rounding
    # error may move in either direction, so single weights have a loose tolerance and all updates together a tight one.
    matched = pairs(state, literal)
    for role in ("teacher", "student"):
        kv = matched[role][: len(literal.kv_names)]
        assert len(kv) == len(state.trainables.weights[role].parameters)
        for own, reference in kv:
            torch.testing.assert_close(own.data, reference.data, rtol=0, atol=4e-5)
        difference = torch.cat([(own - reference).detach().flatten() for own, reference in kv])
        update = torch.cat([d.flatten() for d in state.trainables.weights[role].deltas().values()])
        assert (difference.norm() / update.norm()).item() < 1e-2
        assert update.abs().max().item() > 1e-5
    torch.testing.assert_close(
        state.trainables.token_embeddings["teacher"].data, literal.token_embedding.data, rtol=0, atol=1e-7
    )
    assert (literal.token_embedding.data - start).abs().max().item() > 1e-5
    for own, reference in matched["critics"]:
        torch.testing.assert_close(own.data, reference.data, rtol=0, atol=1e-5)
    # Both drew the same random numbers.
    assert torch.equal(state.random.generators["data"].get_state(), literal.data_generator.get_state())
    assert torch.equal(state.random.generators["noise"].get_state(), literal.noise_generator.get_state())


def test_a_repeated_view_is_encoded_once(tiny_state, photographs, monkeypatch):
    """Three photographs and their mirror images are six views; twelve iterations draw 24 images."""
    state = tiny_state(batch_size=2, augment=False)
    images = square_images(load_photographs(photographs), 64, "center")
    source, encoded = TrainingImages(images, state.settings, 8), []
    posterior = state.family.posterior
    monkeypatch.setattr(state.family, "posterior", lambda x: encoded.append(x) or posterior(x))
    drawn = []
    for state.step in range(12):
        batch = source.draw(state.step, state.random.generators["data"])
        drawn.extend(batch.pixels)
        teacher_step(state, batch)
    assert all(len(x) == 1 for x in encoded)
    assert len(encoded) == len({x.numpy().tobytes() for x in drawn}) == 6
