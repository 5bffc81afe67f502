"""A user's photographs: find them in a folder, read any common format as upright 8-bit RGB, make them square.

Everything unusual is settled here, once: alpha lies on white, 16-bit grey is scaled instead of clipped, EXIF turns the
picture upright, and of an animation the first frame counts. Embedded colour profiles are not applied.
"""

from __future__ import annotations

import re
import threading
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError

MAX_PIXELS = 64_000_000  # of one image. Below Pillow's MAX_IMAGE_PIXELS, which some programs lift; this one stays.
MIN_SIDE = 64  # pixels. A smaller picture would be enlarged eightfold or more, and the model would learn the blur.

CROPS = ("center", "squash")

# Pillow's names of the formats that photographs come in. HEIF and JXL are there only where a plugin registered them.
# The others stay shut: they include PostScript, which Pillow hands to an interpreter, and video and data containers.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")

# Photographs to a user, whether or not Pillow knows them: they are named when they cannot be read, not skipped.
UNDECODED_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"})
# Pillow takes most camera raw files for TIFF and would return the small preview inside, so they are never opened.
RAW_SUFFIXES = frozenset({".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"})

_decoding = threading.Lock()


@dataclass(frozen=True)
class Photograph:
    """One photograph as the method uses it.

    name: the file's name without its folder. image: mode RGB, 8 bits a channel, upright, without metadata.
    """

    name: str
    image: Image.Image


class _UnreadableError(InputError):
    """A file that holds no picture we can decode; among readable ones it is left out instead of stopping the run."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"photograph {path} could not be read: {reason}.")
        self.path = path
        self.reason = reason


def find_photographs(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The photographs that `source` names: a folder's image files, one file, or a list of files.

    A folder is read without its subfolders and hidden files, and sorted by name with numbers by value and letters
    without case, the same on every system; what counts as an image there goes by the file's extension. Files that are
    named one by one keep their order and may have any extension.

    Raises InputError for a path that is missing or neither file nor folder, for a folder that cannot be listed, is
    empty or holds no image file, and for an empty list.
    """
    one = isinstance(source, (str, Path))
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if not paths or (one and not str(source).strip()):  # Path("") would be the current folder
        raise InputError("no photographs were named; give a folder of images, an image file, or a list of files.")
    try:
        if one and paths[0].is_dir():
            return _images_in(paths[0])
        for path in paths:
            _check_file(path)
    except OSError as error:  # a folder that may not be read, a name longer than the system allows
        raise InputError(f"the photographs at {error.filename} cannot be reached: {error.strerror}.") from error
    return paths


def load_photograph(path: str | Path) -> Photograph:
    """Read one image file as upright 8-bit RGB (see `_to_rgb`). Size limits are checked before pixels are decoded.

    Raises InputError for a file that is missing, cannot be decoded or is cut off, has a side under MIN_SIDE pixels, or
    has more than MAX_PIXELS pixels (or more than Pillow's own limit, where that is lower).
    """
    path = Path(path)
    try:
        if not path.is_file():  # before it is opened: reading a named pipe would wait for ever
            raise _UnreadableError(path, "it is not a regular file" if path.exists() else "there is no such file")
        if path.suffix.lower() in RAW_SUFFIXES:
            raise _UnreadableError(path, "it is a camera raw file, to be exported as JPEG, PNG or TIFF first")
        # Pillow gets the open file: given a path it maps grey and CMYK TIFFs into memory and scrambles the turned ones.
        with _strict_pillow(), path.open("rb") as file, Image.open(file, formats=_readable_formats()) as opened:
            _check_size(path, *opened.size)
            full_scale, inverted = _grey_scale(opened)
            opened.load()
            image = _to_rgb(ImageOps.exif_transpose(opened), full_scale, inverted)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow raises these while it opens the file, so only its message knows the size.
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(path, f"{int(found[1]):,}" if found else "far too many") from error
    except Exception as error:  # on a malformed file Pillow's decoders raise almost anything
        raise _UnreadableError(path, _reason(path, error)) from error
    return Photograph(path.name, image)


def load_photographs(source: str | Path | Sequence[str | Path], limit: int = 0) -> list[Photograph]:
    """Read the photographs that `source` names (see `find_photographs`): the first `limit` readable ones, 0 for all.

    Files after the first `limit` readable ones are not opened. Those that cannot be read are left out with a warning
    that names each and why.

    Raises InputError as `find_photographs` does; for an image that is too small or too large; if none can be read.
    """
    if limit < 0:
        raise InputError(f"the number of photographs to use is {limit}; expected 0 for all of them, or more.")
    photographs: list[Photograph] = []
    unreadable: list[_UnreadableError] = []
    for path in find_photographs(source):
        try:
            photographs.append(load_photograph(path))
        except _UnreadableError as error:
            unreadable.append(error)
        if limit and len(photographs) == limit:
            break
    named = "; ".join(f"{error.path.name} ({error.reason})" for error in unreadable)
    if not photographs:
        where = f"in {source}" if isinstance(source, (str, Path)) else "of the list"
        raise InputError(f"not one photograph {where} could be read: {named}; save them as JPEG or PNG.")
    if unreadable:
        warnings.warn(f"photographs left out because they could not be read: {named}.", stacklevel=2)
    return photographs


def to_square(image: Image.Image, size: int, crop: str) -> Tensor:
    """An RGB image as a square, resampled with Pillow's Lanczos filter: uint8 (3, size, size), 0..255.

    crop "center": the shorter side becomes `size` and the middle of the longer is kept; "squash": each side becomes
    `size`, whatever that does to the proportions (the protocol of the paper's evaluation).
    Raises InputError for another crop or a size below 1.
    """
    if size < 1:
        raise InputError(f"the side of the training images is {size}; expected 1 pixel or more.")
    if crop == "center":
        square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    elif crop == "squash":
        square = image.resize((size, size), Image.Resampling.LANCZOS)
    else:
        raise InputError(f"setting crop is {crop!r}; expected one of {', '.join(CROPS)}.")
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _images_in(folder: Path) -> list[Path]:
    """The image files of a folder by extension, in natural order. Raises InputError if there are none."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir()]
    suffixes = _readable_suffixes() | UNDECODED_SUFFIXES | RAW_SUFFIXES
    images = [path for path in entries if path.suffix.lower() in suffixes]
    if not images:
        found = f"holds {len(entries)} files, none of them an image" if entries else "is empty"
        raise InputError(f"folder {folder} {found}; put JPEG or PNG photographs into it (subfolders are not searched).")
    return sorted(images, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sort key in which 2.jpg precedes 10.jpg, a.jpg B.jpg, and dog.jpg dog2.jpg; ties go by the whole name."""
    # macOS hands out names decomposed, others as written: without a normal form, accents would sort differently.
    stem, name = (unicodedata.normalize("NFC", text) for text in (path.stem, path.name))
    # The split alternates text and digits, beginning with text, so that equal places always hold equal types.
    parts = re.split(r"([0-9]+)", stem.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file."""
    if path.is_file():
        return
    if path.is_dir():
        raise InputError(f"{path} in the list of photographs is a folder; list its files, or give the folder alone.")
    if path.exists():
        raise InputError(f"{path} is neither a file nor a folder; give a folder of photographs, or an image file.")
    raise InputError(f"there is no file or folder {path}; check its name, or give another folder of photographs.")


def _check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError for a size out of MIN_SIDE and MAX_PIXELS, in pixels."""
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} = {width * height:,}")
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"photograph {path} is {width}x{height} pixels; expected at least {MIN_SIDE} on each side: "
            "use a larger picture, or take this one out."
        )


def _too_large(path: Path, pixels: str) -> InputError:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return InputError(f"photograph {path} has {pixels} pixels; expected at most {limit:,}: make it smaller.")


def _readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()  # Image.OPEN is filled lazily
    return [name for name in FORMATS if name in Image.OPEN]


def _readable_suffixes() -> set[str]:
    """Lower-case extensions, with the dot, of the formats that this Pillow can open."""
    readable = _readable_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Within this, a file that is cut off is an error, and so is Pillow's warning of a decompression bomb."""
    # A host program may have told Pillow to fill what is missing with grey; the model would learn the grey.
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The largest grey value that an opened file of mode I or I;16 can hold, and whether 0 is white (TIFF 6.0)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample; Pillow widens 12 bits to 16 without scaling them
    return (4095 if bits == 12 else 65535), tags.get(262) == 0  # PhotometricInterpretation: WhiteIsZero


def _to_rgb(image: Image.Image, full_scale: int, inverted: bool) -> Image.Image:
    """An image of any mode as 8-bit RGB: alpha composited on white, deep grey scaled to 0..255, metadata dropped.

    full_scale: the white of modes I and I;16, in which Pillow holds grey of 12 and 16 bits. inverted: 0 is white there.
    Raises ValueError, worded as a reason, for floating-point images (mode F), for grey values outside 0..full_scale,
    and where Pillow knows no conversion.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point values, which name no white; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image, full_scale, inverted)
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # where and when a photograph was taken must not travel into anything made from it
    return image


def _grey_to_8_bits(image: Image.Image, full_scale: int, inverted: bool) -> Image.Image:
    """Mode I or I;16 as L, 0..full_scale to 0..255 and rounded; as LA where one grey value is declared transparent."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > full_scale:
        # 32-bit integers have no agreed white, and guessing one from the values would make each picture its own.
        raise ValueError(f"its grey values span {low} to {high} instead of 0 to {full_scale}; save it with 8 bits")
    scaled = ((grey.astype(np.uint32) * 255 + full_scale // 2) // full_scale).astype(np.uint8)
    if inverted:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")  # compared before scaling: one value, not all that round to it
    if transparent is None:
        return Image.fromarray(scaled)
    alpha = np.where(grey == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(scaled), Image.fromarray(alpha)))


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, as the end of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "it is empty"
        if path.suffix.lower() in UNDECODED_SUFFIXES - _readable_suffixes():
            return f"this Pillow cannot decode {path.suffix[1:].upper()} files"
        return "it is damaged, or no image of a format that is read here"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the system's own words: permission denied, input/output error
    reason = str(error).rstrip(".") or type(error).__name__
    return reason if isinstance(error, ValueError) else f"it is damaged or cut off ({reason})"
