"""Opens the family of a run's model sources, offline."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..files import why_missing
from ..logs import logger
from ..messages import shortened
from ..settings import nearest
from .architectures import SD1
from .checkpoint import Source
from .embedded import embedded_folder
from .family import Family
from .hub import HUB, cached_file, cached_folder
from .load import load_family
from .sources import CUSTOM, FAMILIES, ModelSources, NamedFamily, family_name
from .tiny import tiny_checkpoint

log = logger(__name__)


def open_family(sources: ModelSources, *, with_teacher: bool = True) -> Family:
    """Load the family of these sources, offline.

    with_teacher: False leaves the teacher's UNet out. The text encoder is the teacher's where its checkpoint is
        available, else the student's; an adapter's fingerprints show whether they agree.
    Raises InputError where a file, or a download in the hub cache, is missing, with the command for the download.
    """
    sources.check_named()
    named = FAMILIES[sources.family]
    teacher_prediction = sources.teacher_prediction
    if not sources.teacher and teacher_prediction == "auto":
        teacher_prediction = named.teacher_prediction
    lora: Path | None = Path(sources.student_lora) if sources.student_lora else None
    if lora is not None and not lora.is_file():
        raise InputError(f"student_lora {lora} {why_missing(lora)}; expected a .safetensors file.")
    if lora is None and named.student_lora and not sources.student:
        lora = _family_lora(named)
    is_custom = sources.family == CUSTOM
    lacks_teacher = not sources.teacher and (
        is_custom or (named.teacher in HUB and cached_folder(named.teacher) is None)
    )
    if is_custom and lacks_teacher and with_teacher:
        raise InputError("the family custom has no teacher of its own; name one with --teacher.")
    family = load_family(
        _locate(sources.student, "student", named),
        None if lacks_teacher and not with_teacher else _locate(sources.teacher, "teacher", named),
        name=sources.family,
        with_teacher=with_teacher,
        student_prediction=sources.student_prediction,
        teacher_prediction=teacher_prediction,
        student_lora=lora,
        licences={
            "teacher": _licence(sources.teacher, named.teacher),
            "student": _licence(sources.student, named.student),
        },
    )
    if sources.student and sources.family not in (CUSTOM, "tiny", "miniature"):
        # The user's own student may belong to another family.
        predicts = family.teacher.schedule.prediction_type if family.teacher is not None else None
        # Hyper-SD's student is SD 1.5 with a merged LoRA; the weights do not show that, so the user's word counts.
        is_hyper = sources.family == "hyper-sd15" and family.architecture.text_width == SD1.text_width
        family.name = sources.family if is_hyper else family_name(family.architecture, predicts)
    log.info("family %s: opened", family.name)
    for role, denoiser in (("student", family.student), ("teacher", family.teacher)):
        if denoiser is not None:
            predicts = denoiser.schedule.prediction_type
            log.info("%s: %s, %s, fingerprint %s", role, shortened(denoiser.origin), predicts, denoiser.fingerprint)
    log.debug("text encoder: fingerprint %s", family.text_fingerprint)
    return family


def _family_lora(named: NamedFamily) -> Path:
    if named.student_lora in HUB:
        cached = cached_file(named.student_lora, HUB[named.student_lora].files[0])
        if cached is None:
            raise _not_cached(named.student_lora, named)
        return cached
    path = Path(named.student_lora)
    if not path.is_file():
        raise InputError(f"the family's student_lora {path} {why_missing(path)}; expected a .safetensors file.")
    return path


def _locate(own: str, role: str, named: NamedFamily) -> Source:
    default = named.teacher if role == "teacher" else named.student
    if own:
        if Path(own).exists():
            return Path(own)
        if own in HUB:
            default = own
        else:
            raise InputError(
                f"checkpoint {own!r} {why_missing(Path(own))}; expected a diffusers folder, a .safetensors file, or "
                f"one of {', '.join(HUB)}{nearest(own, HUB)}."
            )
    if default == "miniature":
        return embedded_folder(role)
    if default == "tiny":
        return tiny_checkpoint(role)
    if default not in HUB:
        return Path(default)
    folder = cached_folder(default)
    if folder is None:
        raise _not_cached(default, named)
    return folder


def _not_cached(name: str, named: NamedFamily) -> InputError:
    wanted = named.bundle or name
    return InputError(
        f"{HUB[name].repo} is not in the hub cache and nothing is downloaded unasked; run: echodistill download "
        f"{wanted}, or name files of your own with --teacher and --student."
    )


def _licence(own: str, default: str) -> str:
    if own and own not in HUB:
        usual = f"; {HUB[default].licence} if it is {HUB[default].repo}" if default in HUB else ""
        return f"that of the checkpoint {Path(own).name}{usual}"
    if default == "miniature":
        return "MIT"
    if (own or default) in HUB:
        return HUB[own or default].licence
    return "MIT (random weights)" if default in ("tiny", "") else f"that of the checkpoint {Path(default).name}"
