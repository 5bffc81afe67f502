"""The prediction type that a checkpoint declares, in its metadata or by marker tensors without values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..diffusion import PREDICTION_TYPES
from ..errors import InputError
from ..messages import shortened

_WORDS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
# Marker tensors. ComfyUI writes v_pred for a v-prediction UNet and reads all of these (comfy/supported_models.py).
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
EDM_MARKS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MARKS = (V_MARK, ZERO_SNR_MARK)


@dataclass(frozen=True)
class DeclaredPrediction:
    """The prediction type and noise schedule that a source declares.

    prediction: one of diffusion.PREDICTION_TYPES, another word as found, or None where nothing is declared.
    where: the field that declares it. zero_snr: whether the schedule is rescaled to zero terminal SNR.
    warnings: contradictions within the source.
    """

    prediction: str | None = None
    where: str = ""
    zero_snr: bool = False
    warnings: tuple[str, ...] = ()


def read_declared(metadata: Mapping[str, str], names: Collection[str], origin: str) -> DeclaredPrediction:
    """The declaration in the metadata and tensor names of a single file.

    Precedence where they contradict each other: modelspec, kohya's ss_ fields, the marker tensor v_pred.
    Raises InputError for the marker tensors of an EDM model, which has another noise schedule.
    """
    edm = next((mark for mark in EDM_MARKS if mark in names), None)
    if edm is not None:
        raise InputError(
            f"{origin}: tensor {edm} marks an EDM model, whose noise schedule is another; expected a Stable Diffusion "
            "1.5, 2.1 or Turbo checkpoint that predicts epsilon or v; choose another."
        )
    found = {}
    spec = metadata.get("modelspec.prediction_type", "").strip()
    if spec:
        found["modelspec.prediction_type"] = _WORDS.get(spec.lower().replace("-", "_"), spec)
    kohya = metadata.get("ss_v_parameterization", "").strip().lower()
    if kohya in ("true", "1", "false", "0"):
        found["ss_v_parameterization"] = "v_prediction" if kohya in ("true", "1") else "epsilon"
    if V_MARK in names:
        found[f"the tensor {V_MARK}"] = "v_prediction"
    zero_snr = ZERO_SNR_MARK in names or metadata.get("ss_zero_terminal_snr", "").strip().lower() in ("true", "1")
    if not found:
        return DeclaredPrediction(zero_snr=zero_snr)
    where, prediction = next(iter(found.items()))
    others = [f"{place} states {shortened(word)}" for place, word in found.items() if word != prediction]
    warnings: tuple[str, ...] = ()
    if others:
        warnings = (
            f"{origin} contradicts itself: {where} states {shortened(prediction)}, but {' and '.join(others)}; "
            f"{shortened(prediction)} is used unless --student-prediction or --teacher-prediction says otherwise.",
        )
    return DeclaredPrediction(prediction, where, zero_snr, warnings)


def resolve_prediction(stated: DeclaredPrediction, guess: str | None, asked: str, origin: str) -> tuple[str, list[str]]:
    """(prediction type, warnings). Precedence: the requested type, the declared one, the guess.

    asked: "auto" or a prediction type. guess: from the weights; None where no guess was made.
    """
    warnings = list(stated.warnings)
    if asked != "auto":
        if stated.prediction is not None and stated.prediction != asked:
            warnings.append(
                f"{origin} states that it predicts {shortened(stated.prediction)} ({stated.where}), but {asked} was "
                f"asked for and is used."
            )
        return asked, warnings
    if stated.prediction is None:
        return guess or "epsilon", warnings
    if stated.prediction in PREDICTION_TYPES and guess is not None and guess != stated.prediction:
        warnings.append(
            f"{origin} states that it predicts {stated.prediction} ({stated.where}), but its weights look like those "
            f"of a model that predicts {guess}; {stated.prediction} is used unless --student-prediction or "
            "--teacher-prediction says otherwise."
        )
    return stated.prediction, warnings
