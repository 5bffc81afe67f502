"""Reads one network's folder: its configuration, and its weights in one file or in shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..messages import listed, shortened
from ..tensorfile import read_tensors

_STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError where the file is missing or holds anything else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; expected a whole diffusers folder, download it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({shortened(error)}); download it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object; download it again.")
    return config


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of one network's folder: one safetensors file or shards with an index.

    Preference: the file without a variant in its name, fp16, a single other variant.
    Raises InputError for a folder without weights, with several other variants or with pickles only, and for shards
    that the index lists and the folder lacks.
    """
    for stem in _STEMS:
        for variant in ("", ".fp16"):
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return read_tensors(folder / f"{stem}{variant}.safetensors")
            for index in _indices(stem, variant):
                if (folder / index).is_file():
                    return _sharded(folder / index)
    others = _other_variants(folder)
    if len(others) == 1:
        (path,) = others.values()
        return _sharded(path) if path.suffix == ".json" else read_tensors(path)
    if others:
        raise InputError(
            f"{folder} holds its weights as several variants ({listed(list(others), 6)}); expected one, or one file "
            "without a variant in its name: delete the others, or rename one to "
            f"{next(iter(others)).split('.')[0]}.safetensors."
        )
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({shortened(pickles[0])}), which can run code when opened; "
            "convert them to .safetensors, for instance with save_pretrained(safe_serialization=True) on a machine you "
            "can spare."
        )
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = f"; it holds {listed(there, 6)}" if there else ""
    raise InputError(
        f"{folder} holds no .safetensors weights{found}; expected {' or '.join(f'{s}.safetensors' for s in _STEMS)}, "
        "or shards with their index; download the checkpoint again."
    )


def _indices(stem: str, variant: str) -> tuple[str, ...]:
    """File names of an index, in diffusers' and in transformers' form."""
    return tuple(dict.fromkeys((f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")))


def _other_variants(folder: Path) -> dict[str, Path]:
    """Variant -> its file, or the index of its shards, for all variants."""
    result = {}
    for stem in _STEMS:
        for path in sorted(folder.glob(f"{stem}.*.safetensors")):
            variant = path.name.removeprefix(f"{stem}.").removesuffix(".safetensors")
            if not _SHARD.search(path.name):
                result[f"{stem}.{variant}"] = path
        for path in sorted(folder.glob(f"{stem}.*index*.json")):
            variant = re.sub(r"\.?safetensors\.index|\.json$", "", path.name.removeprefix(f"{stem}.")).strip(".")
            result.setdefault(f"{stem}.{variant}", path)
    return result


def _sharded(index: Path) -> dict[str, Tensor]:
    try:
        shards = sorted({Path(str(shard)).name for shard in read_config(index)["weight_map"].values()})
    except (KeyError, AttributeError):
        shards = []
    if not shards:
        raise InputError(f"{index} names no shards (weight_map); download the checkpoint again.")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise InputError(
            f"{index.parent / shortened(missing[0])} does not exist: of the {len(shards)} shards that {index.name} "
            f"names, {len(missing)} are missing ({listed(missing, 6)}); download them again."
        )
    return {name: tensor for shard in shards for name, tensor in read_tensors(index.parent / shard).items()}
