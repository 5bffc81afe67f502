"""Builds the state of a run at step 0: networks on the device, initial values, optimisers."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..devices import DTYPES, ONE_MEMORY, computes_bf16, pick_device
from ..errors import InputError, Notice
from ..losses.objectives import LOSS_TERMS, CriticHead
from ..messages import quoted
from ..models.family import Family
from ..perception.backbones import Backbone
from ..settings import TrainSettings
from .compute import Compute
from .offload import ModelOffloader
from .start import Start, apply_deltas
from .state import RandomStreams, Trainables, TrainState
from .trainable import TrainedWeights

ROLES = ("teacher", "student")
CRITICS = ("clip", "dino", "dinov2")


def needed_backbones(settings: TrainSettings) -> dict[str, str]:
    """The backbones that these settings use: role ("dino", "dinov2", "clip" or a registered name) -> name in SPECS."""
    roles = set(settings.critic_weights)
    if settings.aligns and settings.identity_weight > 0:
        roles.add("clip")
    return {role: settings.dinov2_backbone if role == "dinov2" else role for role in sorted(roles)}


def needs_teacher(settings: TrainSettings, started: Collection[str] = ()) -> bool:
    """Whether a run uses the teacher. started: the roles that start from an adapter."""
    return settings.teaches or settings.aligns or "teacher" in started


def token_learns_from(settings: TrainSettings, started: Collection[str] = ()) -> str:
    """The role whose losses train the token that the student reads: "teacher" or "student".

    It is the teacher if the token is shared and the teacher learns or starts from an adapter: a personalised teacher is
    only valid with the token it was trained with. Otherwise it is the student.
    started: the roles that start from an adapter.
    """
    is_personalised = settings.teaches or "teacher" in started
    return "teacher" if is_personalised and settings.share_text_encoder else "student"


def check_learns(settings: TrainSettings, family: Family, started: Collection[str] = ()) -> None:
    """Raise InputError if the settings need a missing teacher, name an unknown loss term, or train no parameter.

    started: the roles that start from an adapter.
    """
    for name in settings.extra_loss_weights:
        if name not in LOSS_TERMS:
            known = ", ".join(LOSS_TERMS) or "none is registered"
            raise InputError(
                f"setting extra_losses names {quoted(name)}; expected a registered loss term: {known}; run the file "
                "that registers it in place of echodistill, or import it first."
            )
    if needs_teacher(settings, started) and family.teacher is None:
        raise InputError("these settings need a teacher and none was given; give one, or set its weights to 0.")
    has_weights = settings.trainable != "token"
    own_token = settings.trainable.endswith("token") and token_learns_from(settings, started) == "student"
    student_learns = settings.generates or settings.student_reconstruction_weight > 0
    if not settings.teaches and not (student_learns and (has_weights or own_token)):
        raise InputError(
            f"nothing would learn with trainable {settings.trainable} and these weights of the losses; raise one of "
            "teacher_weight, alignment_weight, adversarial_weight."
        )


def new_state(
    family: Family, backbones: dict[str, Backbone], settings: TrainSettings, start: Mapping[str, Start] | None = None
) -> TrainState:
    """The state of a run at step 0.

    Moves the family, in place, to the settings' device and precision, and installs the trained parameters in its UNets.
    `Family.restore` undoes both.
    family: its text encoder must know the placeholder (`with_placeholders`).
    start: role -> initial values, for roles that start from an adapter.
    Raises InputError if a needed teacher or backbone is missing, or if the settings train no parameter.
    """
    start = start or {}
    check_learns(settings, family, start)
    for role, name in needed_backbones(settings).items():
        if role not in backbones:
            raise InputError(f"these settings need the backbone {name}; load it, or set the weights of its terms to 0.")
    device = pick_device(settings.device)
    weights = _initial_weights(family, settings, start)
    embeddings = _initial_embeddings(family, settings, start, device)
    compute = _place_on_device(family, weights, backbones, settings, device)
    # Seeds are seed + 1, 2, 3 in this order, so adding the third generator does not change the other two.
    streams = ("data", "noise", *(("prior",) if settings.prior_roles else ()))
    generators = {name: torch.Generator().manual_seed(settings.seed + i) for i, name in enumerate(streams, 1)}
    state = TrainState(
        settings=settings,
        family=family,
        backbones=backbones,
        trainables=Trainables(weights, embeddings, _initial_critics(backbones, settings, device), {}),
        random=RandomStreams(generators),
        compute=compute,
        started=frozenset(start),
    )
    state.trainables.optimizers = new_optimizers(state)
    return state


def parameter_groups(state: TrainState) -> dict[str, list[dict[str, Any]]]:
    """Player -> AdamW parameter groups, each with its learning rate before decay.

    Token embeddings are a group of the role whose losses train them.
    """
    s, trainables = state.settings, state.trainables
    groups: dict[str, list[dict[str, Any]]] = {"teacher": [], "student": [], "critics": []}
    for role, lr in (("teacher", s.teacher_lr), ("student", s.student_lr)):
        if role in trainables.weights and trainables.weights[role].parameters:
            groups[role].append({"params": list(trainables.weights[role].parameters.values()), "lr": lr})
    if s.trainable.endswith("token"):
        if s.teaches:
            groups["teacher"].append({"params": [trainables.token_embeddings["teacher"]], "lr": s.token_lr})
        if token_learns_from(s, state.started) == "student":
            groups["student"].append({"params": [trainables.token_embeddings["student"]], "lr": s.token_lr})
    if len(trainables.critics):
        groups["critics"].append({"params": list(trainables.critics.parameters()), "lr": s.critic_lr})
    # AdamW does not accept an empty list of groups, and every player has an optimiser.
    return {name: group or [{"params": [], "lr": 0.0}] for name, group in groups.items()}


def new_optimizers(state: TrainState) -> dict[str, torch.optim.AdamW]:
    """Player -> a new AdamW optimiser of its parameters."""
    common: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": state.settings.weight_decay, "fused": True}
    return {name: torch.optim.AdamW(groups, **common) for name, groups in parameter_groups(state).items()}


def _initial_weights(family: Family, settings: TrainSettings, start: Mapping[str, Start]) -> dict[str, TrainedWeights]:
    """Role -> trained weights, for the roles that learn.

    The start values of a frozen teacher are added to its UNet in place.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    denoisers = {"student": family.student}
    if family.teacher is not None and settings.teaches:
        denoisers["teacher"] = family.teacher
    weights = {
        role: TrainedWeights(denoisers[role].unet, settings.trainable, settings.lora_rank, generator)
        for role in ROLES
        if role in denoisers
    }
    for role, initial in start.items():
        if role in weights:
            weights[role].load_initial(initial.deltas, initial.factors)
        elif family.teacher is not None:
            apply_deltas(family.teacher.unet, initial.deltas)
    return weights


def _initial_embeddings(
    family: Family, settings: TrainSettings, start: Mapping[str, Start], device: torch.device
) -> dict[str, nn.Parameter]:
    """Role -> initial token embeddings (vectors, width), float32: the start's, or the class noun's mean embedding.

    Called before the family is cast, so that the mean has the precision of the file.
    """
    noun = family.text.noun_embeddings(settings.class_noun, settings.vectors)
    initial = {role: start[role].token_embeddings if role in start else noun for role in ROLES}
    if settings.share_text_encoder:
        first = "teacher" if "teacher" in start else "student"
        shared = nn.Parameter(initial[first].clone().to(device))
        return {"teacher": shared, "student": shared}
    return {role: nn.Parameter(initial[role].clone().to(device)) for role in ROLES}


def _initial_critics(backbones: Mapping[str, Backbone], settings: TrainSettings, device: torch.device) -> nn.ModuleDict:
    """Critic -> a new head. Each head has its own generator, so its values do not depend on the other critics."""

    def seed(role: str) -> int:
        return settings.seed + 100 + (CRITICS.index(role) if role in CRITICS else zlib.crc32(role.encode()))

    roles = [*(role for role in CRITICS if role in settings.critic_weights)]
    roles += sorted(settings.critic_weights.keys() - set(CRITICS))
    heads = {role: CriticHead(backbones[role].width, torch.Generator().manual_seed(seed(role))) for role in roles}
    return nn.ModuleDict(heads).to(device)


def _place_on_device(
    family: Family,
    weights: Mapping[str, TrainedWeights],
    backbones: Mapping[str, Backbone],
    settings: TrainSettings,
    device: torch.device,
) -> Compute:
    """Move every network to the device, cast it, and install the trained weights. Returns the compute options."""
    dtype = DTYPES[settings.precision]
    if settings.precision == "bf16" and not computes_bf16(device):
        text = f"{device} has no instructions for bfloat16: precision bf16 halves memory there, but fp32 is faster."
        warnings.warn(text, category=Notice, stacklevel=3)
    family.to(device, dtype)
    for trained in weights.values():
        trained.install(device, dtype)
    compute = Compute()
    if settings.memory_mode == "low":
        compute = Compute(microbatch_size=1, recompute=True)
        if device.type not in ONE_MEMORY and family.teacher is not None:
            unets = [family.student.unet, family.teacher.unet]
            compute.offloader = ModelOffloader(unets, device)
            family.on_restore.append(compute.offloader.remove)
    for backbone in backbones.values():  # after offloading the UNets, which frees device memory
        backbone.to(device=device, dtype=dtype)
    return compute
