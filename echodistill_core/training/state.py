"""Everything that changes while a run trains, and how it is made at the start."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import DivergedError, InputError
from ..losses.adversarial import CriticHead
from ..models.family import Family
from ..perception.backbones import Backbone
from ..settings import TrainSettings
from .batches import TrainingImages
from .start import Start, wear
from .trainable import TrainedWeights

ROLES = ("teacher", "student")
CRITICS = ("clip", "dino", "dinov2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def needed_backbones(settings: TrainSettings) -> dict[str, str]:
    """The backbones these settings use: role ("dino", "dinov2", "clip") -> name in perception's tables."""
    roles = set(settings.critic_weights)
    if settings.aligns and settings.identity_weight > 0:
        roles.add("clip")
    return {role: settings.dinov2_backbone if role == "dinov2" else role for role in sorted(roles)}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" prefers CUDA, then Apple's MPS. Raises InputError where it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # an assertion: a PyTorch that was built without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); expected auto, cpu, cuda or mps.") from error
    return device


@dataclass
class TrainState:
    """One run in memory.

    rows: the placeholder's embeddings (vectors, width) as each role reads them; one and the same tensor where shared.
    critics: heads by backbone role. generators: "data" draws views and posteriors, "noise" all else; both on the CPU,
    so that a run draws the same numbers on every device. prior: images of the class by the role that they keep from
    drifting (training.prior), with the generator "prior". given: the roles that began from an adapter (training.start).
    """

    settings: TrainSettings
    family: Family
    backbones: dict[str, Backbone]
    weights: dict[str, TrainedWeights]
    rows: dict[str, nn.Parameter]
    critics: nn.ModuleDict
    optimizers: dict[str, torch.optim.AdamW]
    generators: dict[str, torch.Generator]
    prior: dict[str, TrainingImages] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    stage: str = "distil"
    step: int = 0
    _unconditional: Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.family.device

    @property
    def token_learns_from(self) -> str:
        """The role whose loss the student's token learns from; a teacher that does not learn leaves it as it is."""
        return _token_learns_from(self.settings, self.given)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the settings' precision; what is trained stays float32."""
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.settings.precision])

    def text(self, prompts: Sequence[str], role: str) -> Tensor:
        """tau(y) as this role reads it: (B, 77, width). Gradients reach its rows where gradients are on."""
        return self.family.text(prompts, self.rows[role])

    def unconditional(self, count: int) -> Tensor:
        """Text features of the empty prompt, (count, 77, width); made once, since nothing in them learns."""
        if self._unconditional is None:
            with torch.no_grad():
                self._unconditional = self.family.text([""])
        return self._unconditional.expand(count, -1, -1)

    def learned(self, optimizer: str) -> list[nn.Parameter]:
        """The parameters that this optimiser steps."""
        return [p for group in self.optimizers[optimizer].param_groups for p in group["params"]]

    def trained_tensors(self) -> dict[str, Tensor]:
        """Every tensor that learns, by a name that a checkpoint uses. Shared rows stand there once."""
        tensors: dict[str, Tensor] = {}
        for role, weights in self.weights.items():
            tensors.update({f"{role}/{n}": p.detach() for n, p in weights.parameters.items()})
        for role, rows in self.rows.items():
            if role == "student" and "teacher" in self.rows and rows is self.rows["teacher"]:
                continue
            tensors[f"rows/{role}"] = rows.detach()
        tensors.update({f"critics/{n}": p.detach() for n, p in self.critics.named_parameters()})
        return tensors

    def check_finite(self) -> None:
        """Raise DivergedError naming the first trained tensor that is not finite."""
        for name, tensor in self.trained_tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise DivergedError(f"{name} is not finite after step {self.step}; lower the learning rates.")


def _token_learns_from(settings: TrainSettings, given: Collection[str]) -> str:
    # The teacher's, where the token is shared and the teacher learns or came with it: what a personalised teacher says
    # of another token would be of no use. Otherwise no loss but the student's reaches it.
    owned = settings.teaches or "teacher" in given
    return "teacher" if owned and settings.share_text_encoder else "student"


def needs_teacher(settings: TrainSettings, given: Collection[str] = ()) -> bool:
    """Whether a run has a use for the teacher. given: the roles that begin from an adapter."""
    return settings.teaches or settings.aligns or "teacher" in given


def check_learns(settings: TrainSettings, family: Family, given: Collection[str] = ()) -> None:
    """Raise InputError where these settings need a teacher that is not there, or no loss would change anything.

    given: the roles that begin from an adapter.
    """
    if needs_teacher(settings, given) and family.teacher is None:
        raise InputError("these settings need a teacher and none was given; give one, or set its weights to 0.")
    has_weights = settings.trainable != "token"
    own_token = settings.trainable.endswith("token") and _token_learns_from(settings, given) == "student"
    student_learns = settings.generates or settings.student_reconstruction_weight > 0
    if not settings.teaches and not (student_learns and (has_weights or own_token)):
        raise InputError(
            f"nothing would learn with trainable {settings.trainable} and these weights of the losses; raise one of "
            "teacher_weight, alignment_weight, adversarial_weight."
        )


def new_state(
    family: Family, backbones: dict[str, Backbone], settings: TrainSettings, start: Mapping[str, Start] | None = None
) -> TrainState:
    """A run at step 0. The family moves to the settings' device and precision, with the trained weights installed.

    family: with the placeholder declared in its text encoder (`with_placeholders`).
    start: what each role begins from, where it is not the base model.
    Raises InputError where the settings need a teacher or backbone that is not there, or nothing would learn.
    """
    start = start or {}
    check_learns(settings, family, start)
    for role, name in needed_backbones(settings).items():
        if role not in backbones:
            raise InputError(f"these settings need the backbone {name}; load it, or set the weights of its terms to 0.")
    device = pick_device(settings.device)
    init = torch.Generator().manual_seed(settings.seed)
    denoisers = {"student": family.student}
    if family.teacher is not None and settings.teaches:
        denoisers["teacher"] = family.teacher
    weights = {
        role: TrainedWeights(denoisers[role].unet, settings.trainable, settings.lora_rank, init)
        for role in ROLES
        if role in denoisers
    }
    noun = family.text.noun_rows(settings.class_noun, settings.vectors)
    rows = {role: start[role].rows if role in start else noun for role in ROLES}
    if settings.share_text_encoder and "teacher" not in start:
        rows["teacher"] = rows["student"]
    for role, begun in start.items():
        if role in weights:
            weights[role].begin_at(begun.deltas, begun.factors)
        elif family.teacher is not None:
            wear(family.teacher.unet, begun.deltas)
    family.to(device, DTYPES[settings.precision])
    for trained in weights.values():
        trained.install(device)
    for backbone in backbones.values():
        backbone.to(device=device, dtype=DTYPES[settings.precision])
    if settings.gradient_checkpointing:
        _checkpoint_gradients(family, backbones)
    shared = nn.Parameter(rows["teacher"].clone().to(device))
    own = shared if settings.share_text_encoder else nn.Parameter(rows["student"].clone().to(device))
    # A generator for each head: taking one critic away must not start the others differently.
    heads = {
        role: CriticHead(backbones[role].width, torch.Generator().manual_seed(settings.seed + 100 + place))
        for place, role in enumerate(CRITICS)
        if role in settings.critic_weights
    }
    critics = nn.ModuleDict(heads).to(device)
    state = TrainState(
        settings=settings,
        family=family,
        backbones=backbones,
        weights=weights,
        rows={"teacher": shared, "student": own},
        critics=critics,
        optimizers={},
        # The prior's last and only where it is on, so that all else draws what it draws without.
        generators={
            name: torch.Generator().manual_seed(settings.seed + i)
            for i, name in enumerate(("data", "noise", *(("prior",) if settings.prior_roles else ())), 1)
        },
        given=frozenset(start),
    )
    state.optimizers = new_optimizers(state)
    return state


def new_optimizers(state: TrainState) -> dict[str, torch.optim.AdamW]:
    """AdamW of teacher, student and critics. The rows learn in the group of the role whose loss reaches them."""
    s = state.settings
    learns_token = s.trainable.endswith("token")
    groups: dict[str, list[dict[str, object]]] = {"teacher": [], "student": [], "critics": []}
    for role, lr in (("teacher", s.teacher_lr), ("student", s.student_lr)):
        if role in state.weights and state.weights[role].parameters:
            groups[role].append({"params": list(state.weights[role].parameters.values()), "lr": lr})
    if learns_token:
        if s.teaches:
            groups["teacher"].append({"params": [state.rows["teacher"]], "lr": s.token_lr})
        if state.token_learns_from == "student":
            groups["student"].append({"params": [state.rows["student"]], "lr": s.token_lr})
    if len(state.critics):
        groups["critics"].append({"params": list(state.critics.parameters()), "lr": s.critic_lr})
    return {
        # An empty optimiser still has one empty group, so that every role has one to ask.
        name: torch.optim.AdamW(group or [{"params": [], "lr": 0.0}], betas=(0.9, 0.999), weight_decay=s.weight_decay)
        for name, group in groups.items()
    }


def _checkpoint_gradients(family: Family, backbones: dict[str, Backbone]) -> None:
    for module in (family.student.unet, family.vae, *([family.teacher.unet] if family.teacher else [])):
        module.enable_gradient_checkpointing()
    for backbone in backbones.values():
        # transformers recomputes in training mode only; these encoders have no dropout, so nothing else changes.
        encoder = backbone.encoder.train()
        # Renamed in transformers 5, which warns of the old name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = getattr(encoder, next(name for name in names if hasattr(encoder, name)))
        enable({"use_reentrant": False})
