"""Which terms of the student's loss an iteration computes, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..losses.objectives import LOSS_TERMS
from ..settings import TrainSettings


@dataclass(frozen=True)
class LossSchedule:
    """Image losses run in every `image_every`-th iteration, adversarial losses in every `critic_every`-th of those.

    Both are 1 or more. Latent losses run in every iteration. Iterations are numbered from 0, and iteration 0 computes
    all terms.
    """

    image_every: int
    critic_every: int

    @property
    def period(self) -> int:
        """image_every * critic_every: the number of iterations after which the schedule repeats."""
        return self.image_every * self.critic_every

    def has_images(self, step: int) -> bool:
        """Whether iteration `step` computes image losses (Eq. 2 and 4)."""
        return step % self.image_every == 0

    def has_critics(self, step: int) -> bool:
        """Whether iteration `step` computes adversarial losses (Eq. 6 and 7)."""
        return step % self.period == 0


@dataclass(frozen=True)
class TermWeights:
    """The weights, 0 or more, of the student's loss in one iteration. A term of weight 0 is not computed.

    identity, mse, swd: w_id, w_mse, w_swd of Eq. 5. critics: critic -> w_k of Eq. 6.
    latents, images: weights in Eq. 5 of registered loss terms (losses.objectives.LOSS_TERMS) on latents and on images.
    is_complete: whether the iteration computes every term of Eq. 5, the image losses included.
    """

    identity: float
    mse: float
    swd: float
    critics: Mapping[str, float]
    latents: Mapping[str, float]
    images: Mapping[str, float]
    is_complete: bool

    @property
    def alignment(self) -> dict[str, float]:
        """Term -> weight in Eq. 5, registered terms included."""
        return {"identity": self.identity, "mse": self.mse, "swd": self.swd, **self.latents, **self.images}

    @property
    def align(self) -> bool:
        """Whether any term of Eq. 5 is computed."""
        return any(self.alignment.values())

    @property
    def align_images(self) -> bool:
        """Whether any term compares decoded images of student and teacher."""
        return bool(self.identity or self.swd or self.images)

    @property
    def needs_images(self) -> bool:
        """Whether any term uses the student's decoded images."""
        return bool(self.critics) or self.align_images

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones that extract features of the student's images, in the order in which they run."""
        return tuple(sorted({*self.critics, *(("clip",) if self.identity else ())}))


def loss_schedule(settings: TrainSettings) -> LossSchedule:
    """The schedule that the settings image_every and critic_every define."""
    return LossSchedule(settings.image_every, settings.critic_every)


def weights_at(settings: TrainSettings, step: int) -> TermWeights:
    """The weights of the student's loss in iteration `step`, counted from 0."""
    s, schedule = settings, loss_schedule(settings)
    images = s.aligns and schedule.has_images(step)
    registered = s.extra_loss_weights if s.aligns else {}
    return TermWeights(
        identity=s.identity_weight if images else 0.0,
        mse=s.mse_weight if s.aligns else 0.0,
        swd=s.swd_weight if images else 0.0,
        critics=s.critic_weights if schedule.has_critics(step) else {},
        latents={n: w for n, w in registered.items() if LOSS_TERMS[n].compares == "latents"},
        images={n: w for n, w in registered.items() if LOSS_TERMS[n].compares == "images" and images},
        is_complete=schedule.has_images(step),
    )
