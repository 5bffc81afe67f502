"""Which terms of the student's loss an iteration computes, by a table written by hand."""

import pytest

from echodistill_core.errors import InputError
from echodistill_core.losses.objectives import LOSS_TERMS, LossTerm, latent_mse
from echodistill_core.settings import TrainSettings
from echodistill_core.training.schedule import LossSchedule, weights_at


@pytest.mark.parametrize(
    ("image_every", "critic_every", "images", "critics"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 1, [0, 3, 6], [0, 3, 6]),
        (1, 2, [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6]),
        (2, 3, [0, 2, 4, 6], [0, 6]),
    ],
)
def test_images_come_every_so_many_iterations_and_critics_every_so_many_images(
    image_every, critic_every, images, critics
):
    schedule = LossSchedule(image_every, critic_every)
    assert schedule.period == image_every * critic_every
    assert [i for i in range(8) if schedule.has_images(i)] == images
    assert [i for i in range(8) if schedule.has_critics(i)] == critics
    settings = TrainSettings(image_every=image_every, critic_every=critic_every)
    found = [weights_at(settings, i) for i in range(8)]
    assert [i for i, w in enumerate(found) if w.identity and w.swd and w.is_complete] == images
    assert [i for i, w in enumerate(found) if w.critics] == critics
    assert all(w.mse == 1.0 and w.align for w in found)
    assert [w.needs_images for w in found] == [i in images for i in range(8)]


def test_the_weights_are_those_of_the_settings():
    settings = TrainSettings(identity_weight=0.5, mse_weight=2.0, swd_weight=0.25, dino_weight=3.0, clip_weight=0.0)
    w = weights_at(settings, 0)
    assert (w.identity, w.mse, w.swd) == (0.5, 2.0, 0.25)
    assert w.critics == {"dino": 3.0, "dinov2": 1.0}
    assert w.backbones == ("clip", "dino", "dinov2")
    assert w.alignment == {"identity": 0.5, "mse": 2.0, "swd": 0.25}


@pytest.mark.parametrize(
    ("off", "align", "needs_images"),
    [
        ({"alignment_weight": 0.0}, False, True),
        ({"adversarial_weight": 0.0}, True, True),
        ({"adversarial_weight": 0.0, "identity_weight": 0.0, "swd_weight": 0.0}, True, False),
        ({"alignment_weight": 0.0, "adversarial_weight": 0.0}, False, False),
    ],
)
def test_terms_that_are_off_need_nothing(off, align, needs_images):
    w = weights_at(TrainSettings(**off), 0)
    assert (w.align, w.needs_images) == (align, needs_images)


def test_registered_terms_follow_the_schedule_of_what_they_compare():
    LOSS_TERMS.register("of-latents", LossTerm("latents", latent_mse))
    LOSS_TERMS.register("of-images", LossTerm("images", latent_mse))
    try:
        settings = TrainSettings(extra_losses="of-latents=0.5 of-images=2", image_every=2)
        both, latents = (weights_at(settings, i) for i in range(2))
        assert (both.latents, both.images) == ({"of-latents": 0.5}, {"of-images": 2.0})
        assert (latents.latents, latents.images) == ({"of-latents": 0.5}, {})
        assert not weights_at(TrainSettings(extra_losses="of-latents=0"), 0).latents
    finally:
        LOSS_TERMS.unregister("of-latents")
        LOSS_TERMS.unregister("of-images")


@pytest.mark.parametrize("text", ["lpips", "=1", "a=-1", "a=nan", "a=1 a=2", "a=x"])
@pytest.mark.parametrize("name", ["extra_losses", "extra_critics"])
def test_weights_by_name_of_another_form_are_refused(name, text):
    with pytest.raises(InputError, match=name):
        TrainSettings(**{name: text})
