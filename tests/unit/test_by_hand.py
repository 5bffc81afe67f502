"""Whole iterations, however they are computed, are those of the method read literally (benchmarks/plain)."""

import pytest
import torch

from benchmarks.plain import Plain
from echodistill_core.concept.images import square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.architectures import TINY
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.perception.load import load_backbones
from echodistill_core.training import build
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.steps import iterate, teacher_step

# Every way to compute an iteration: settings, and whether the device is to count as one with memory of its own.
WAYS = {
    "normal": ({}, False),
    "low": ({"memory_mode": "low"}, False),
    "low, one UNet at a time": ({"memory_mode": "low"}, True),
    "views that come again": ({"augment": False}, False),
    "views that come again, low": ({"augment": False, "memory_mode": "low"}, False),
}


def plain_of(state):
    return Plain(
        state.settings,
        TINY,
        {role: tiny_checkpoint(role) for role in ("teacher", "student")},
        load_backbones({"dino": "dino", "dinov2": "dinov2", "clip": "clip"}, "tiny"),
        lambda prompt: state.family.text.tokenize([prompt])[0].tolist(),
        state.trainables.critics,
    )


def pairs(state, by_hand):
    """Each trained tensor with its counterpart, by the optimiser that steps it."""
    found = {
        role: [
            (state.trainables.weights[role].parameters[n], p)
            for n, p in zip(by_hand.names, by_hand.kv[role], strict=True)
        ]
        for role in ("teacher", "student")
    }
    found["teacher"].append((state.trainables.token_embeddings["teacher"], by_hand.row))
    found["critics"] = [
        pair
        for r in state.trainables.critics
        for pair in zip(state.trainables.critics[r].parameters(), by_hand.heads[r].parameters(), strict=True)
    ]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_iterations_are_those_of_the_method_read_literally(tiny_state, photographs, monkeypatch, way):
    options, own_memory = WAYS[way]
    if own_memory:
        monkeypatch.setattr(build, "ONE_MEMORY", ())
    state = tiny_state(batch_size=2, seed=4, **options)
    by_hand = plain_of(state)
    images = square_images(load_photographs(photographs), 64, "center")
    sources = [TrainingImages(images, state.settings, 8) for _ in range(2)]
    torch.testing.assert_close(state.trainables.token_embeddings["teacher"].data, by_hand.row.data)
    start = by_hand.row.detach().clone()
    for step in range(2):
        state.step = step
        actual = iterate(state, sources[0].draw(step, state.random.generators["data"]))
        expected = by_hand.iterate(sources[1].draw(step, by_hand.data))
        assert actual.keys() == expected.keys()
        for name in actual:
            # Gradients went through the one-step map, which multiplies rounding by 14.6.
            tolerance = 1e-4 if name.startswith("grad_norm_") else 1e-5
            torch.testing.assert_close(
                actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        if step == 0:
            # AdamW's first moments are a tenth of the first gradient.
            for player, tensors in pairs(state, by_hand).items():
                ours, theirs = state.trainables.optimizers[player].state, by_hand.optimizers[player].state
                for own, reference in tensors:
                    gradient, truth = (s[p]["exp_avg"] for s, p in ((ours, own), (theirs, reference)))
                    assert ((gradient - truth).norm() / truth.norm()).item() < 1e-4, player
    # AdamW moves a weight by about its learning rate, here 1e-5 and 2e-5, whatever the gradient's size: a single weight
    # whose gradient is mere rounding may go anywhere in two steps, so the updates are compared as a whole.
    matched = pairs(state, by_hand)
    for role in ("teacher", "student"):
        kv = matched[role][: len(by_hand.names)]
        assert len(kv) == len(state.trainables.weights[role].parameters)
        for own, reference in kv:
            torch.testing.assert_close(own.data, reference.data, rtol=0, atol=4e-5)
        difference = torch.cat([(own - reference).detach().flatten() for own, reference in kv])
        update = torch.cat([d.flatten() for d in state.trainables.weights[role].deltas().values()])
        assert (difference.norm() / update.norm()).item() < 1e-2
        assert update.abs().max().item() > 1e-5
    torch.testing.assert_close(state.trainables.token_embeddings["teacher"].data, by_hand.row.data, rtol=0, atol=1e-7)
    assert (by_hand.row.data - start).abs().max().item() > 1e-5
    for own, reference in matched["critics"]:
        torch.testing.assert_close(own.data, reference.data, rtol=0, atol=1e-5)
    # Both drew the same random numbers to the end.
    assert torch.equal(state.random.generators["data"].get_state(), by_hand.data.get_state())
    assert torch.equal(state.random.generators["noise"].get_state(), by_hand.noise.get_state())


def test_a_repeated_view_is_encoded_once(tiny_state, photographs, monkeypatch):
    """Three photographs and their mirror images, over twelve iterations of two images."""
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
