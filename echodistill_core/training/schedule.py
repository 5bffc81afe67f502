"""In which iterations which terms of the student's loss are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..losses.objectives import LOSS_TERMS
from ..settings import TrainSettings


@dataclass(frozen=True)
class LossSchedule:
    """Image losses are computed every `image_every` iterations, critics every `critic_every`-th time of those.

    Latent losses are computed in every iteration.
    """

    image_every: int
    critic_every: int

    @property
    def period(self) -> int:
        """image_every * critic_every, the iterations after which the same terms are computed again."""
        return self.image_every * self.critic_every

    def has_images(self, step: int) -> bool:
        """Whether iteration `step`, from 0 on, computes image losses: Eq. 2 and 4."""
        return step % self.image_every == 0

    def has_critics(self, step: int) -> bool:
        """Whether iteration `step`, from 0 on, computes adversarial losses: Eq. 6 and 7."""
        return step % self.period == 0


@dataclass(frozen=True)
class TermWeights:
    """The weights of the student's loss in one iteration. A term of weight 0 is not computed.

    identity, mse, swd: w_id, w_mse, w_swd of Eq. 5. critics: w_k of Eq. 6 by critic.
    latents, images: registered loss terms (losses.objectives.LOSS_TERMS) that compare these.
    is_complete: whether the iteration computes image losses, and so all terms of Eq. 5.
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
        """The weights of Eq. 5 by term, registered ones included."""
        return {"identity": self.identity, "mse": self.mse, "swd": self.swd, **self.latents, **self.images}

    @property
    def align(self) -> bool:
        """Whether a term compares the student with the teacher."""
        return any(self.alignment.values())

    @property
    def align_images(self) -> bool:
        """Whether a term compares the student's image with the teacher's."""
        return bool(self.identity or self.swd or self.images)

    @property
    def needs_images(self) -> bool:
        """Whether a term needs the student's image."""
        return bool(self.critics) or self.align_images

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones that extract features of the student's image, in the order in which they run."""
        return tuple(sorted({*self.critics, *(("clip",) if self.identity else ())}))


def schedule_of(settings: TrainSettings) -> LossSchedule:
    """The schedule of these settings."""
    return LossSchedule(settings.image_every, settings.critic_every)


def weights_at(settings: TrainSettings, step: int) -> TermWeights:
    """The weights of the student's loss in iteration `step`, from 0 on."""
    s, schedule = settings, schedule_of(settings)
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
