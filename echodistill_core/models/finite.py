"""Finds NaN and infinity in weights before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..messages import listed

_CHUNK = 2**20
# Bit pattern, without the sign, of the largest finite 8-bit float; NaN and infinity have larger patterns.
_LARGEST_CODE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. One pass, no copy; integers are always finite."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:
        return _is_finite_8_bit(tensor.detach())
    # aminmax returns NaN if any element is NaN; it is 80 times as fast as isfinite.
    least, greatest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


def _is_finite_8_bit(tensor: Tensor) -> bool:
    largest = _LARGEST_CODE.get(tensor.dtype)
    for chunk in tensor.reshape(-1).split(_CHUNK):
        # torch has no reductions for these types.
        if largest is None:
            finite = bool(torch.isfinite(chunk.float()).all())
        else:
            finite = int((chunk.view(torch.uint8) & 0x7F).max()) <= largest
        if not finite:
            return False
    return True


def check_finite(tensors: Mapping[str, Tensor], names: Mapping[str, str], origin: str) -> None:
    """Raise InputError naming the first tensors that hold NaN or infinity.

    names: the source's names where they differ; origin: the source, for the message.
    """
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if not bad:
        return
    first = tensors[bad[0]]
    count = sum(int((~torch.isfinite(c.float())).sum()) for c in first.detach().reshape(-1).split(_CHUNK))
    called = list(dict.fromkeys(names.get(name, name) for name in bad))
    raise InputError(
        f"{origin}: {len(called)} tensor{'s' if len(called) > 1 else ''} ({listed(called)}) of its weights "
        f"hold{'' if len(called) > 1 else 's'} NaN or infinity ({count} of {first.numel()} values in the first); "
        "expected finite numbers; download the checkpoint again or choose another."
    )
