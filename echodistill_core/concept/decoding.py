"""Any common image format as upright 8-bit sRGB without alpha, with size limits that are checked before decoding.

Everything unusual is settled here, once. Alpha lies on white. 16-bit grey is scaled instead of clipped; of 16-bit
colour Pillow keeps the upper eight bits. Embedded colour profiles are applied to the 8-bit values before alpha is
(see `profiles`); a colour space that only Exif data or the PNG chunks gAMA, cHRM and cICP name is not. EXIF turns the
picture upright, and of an animation the first frame counts.
"""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..messages import shortened
from . import jpeg, png, profiles
from .contents import HEAD, RAW, Content, recognise

MAX_PIXELS = 64_000_000  # of one image. Below Pillow's MAX_IMAGE_PIXELS, which some programs lift; this one stays.
MIN_SIDE = 64  # pixels. A smaller picture would be enlarged eightfold or more, and the model would learn the blur.

# Pillow's names of the formats that photographs come in. HEIF and JXL are there only where a plugin registered them.
# The others stay shut: they include PostScript, which Pillow hands to an interpreter, and video and data containers.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")

# Pillow takes most camera raw files for TIFF and would return the small preview inside, so they are never opened.
RAW_SUFFIXES = frozenset(
    {".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef"}
    | {".srw", ".3fr", ".iiq", ".erf", ".kdc", ".mrw", ".x3f"}
)
# Plugins that teach Pillow a format; they are imported when a file of it is met.
_PLUGINS = {"HEIF": "pillow_heif", "AVIF": "pillow_avif", "JXL": "pillow_jxl"}

_decoding = threading.Lock()


class UnusableError(InputError):
    """A file that gives no photograph; among usable ones it is left out instead of stopping the run.

    reason: why, as the end of a sentence.
    """

    def __init__(self, path: Path, reason: str, message: str = "") -> None:
        super().__init__(message or f"photograph {shortened(path)} could not be read: {reason}.")
        self.path = path
        self.reason = reason


def decode(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture in a regular file as mode RGB without metadata, and notes for the user.

    Raises UnusableError for a file that cannot be decoded or is damaged, has a side under MIN_SIDE pixels, or has more
    than MAX_PIXELS pixels (or more than Pillow's own limit, where that is lower).
    """
    if path.suffix.lower() in RAW_SUFFIXES:
        raise _raw(path)
    content = None
    try:
        # Pillow gets the open file: given a path it maps grey and CMYK TIFFs into memory and scrambles the turned ones.
        with _strict_pillow(), path.open("rb") as file:
            content = recognise(file.read(HEAD))
            file.seek(0)
            _import_plugin(content)
            return _decode(path, file, content)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow raises these while it opens the file, so only its message knows the size.
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(path, f"{int(found[1]):,}" if found else "far too many") from error
    except Exception as error:  # on a malformed file Pillow's decoders raise almost anything
        raise UnusableError(path, _reason(path, content, error)) from error


def readable_suffixes() -> set[str]:
    """Lower-case extensions, with the dot, of the formats that this Pillow can open."""
    readable = _readable_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}


def _decode(path: Path, file: BinaryIO, content: Content | None) -> tuple[Image.Image, list[str]]:
    """`decode` for an open file. Pillow has to be strict. Raises whatever Pillow does."""
    embedded: bytes | png.ProfileError | None = None
    kind = content.readable if content else ""
    view, embedded = png.strip_text(file) if kind == "PNG" else (file, None)
    with Image.open(view, formats=_readable_formats()) as opened:
        _check_size(path, *opened.size)
        if opened.format == "TIFF" and _is_raw(opened):
            raise _raw(path)
        if kind != "PNG" and "icc_profile" in opened.info:
            embedded = opened.info["icc_profile"] or png.ProfileError("has parts missing")
        full_scale, inverted = _grey_scale(opened)
        opened.load()
        if kind == "JPEG":
            file.seek(0)
            damage = jpeg.find_damage(file.read(jpeg.MAX_BYTES))
            if damage:
                raise UnusableError(path, f"it is damaged: {damage}")
        image = _plain_mode(ImageOps.exif_transpose(opened), full_scale, inverted)
    note = ""
    if isinstance(embedded, bytes):
        image, note = profiles.to_srgb(image, embedded)
    elif embedded is not None:
        note = f"its colour profile was ignored, because it {embedded}"
    return _on_white(image), [note] if note else []


def _check_size(path: Path, width: int, height: int) -> None:
    """Raise UnusableError for a size out of MIN_SIDE and MAX_PIXELS, in pixels."""
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} = {width * height:,}")
    if min(width, height) < MIN_SIDE:
        raise UnusableError(
            path,
            f"it is {width}x{height} pixels; expected at least {MIN_SIDE} on each side",
            f"photograph {shortened(path)} is {width}x{height} pixels; expected at least {MIN_SIDE} on each side: "
            "use a larger picture, or take this one out.",
        )


def _too_large(path: Path, pixels: str) -> UnusableError:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return UnusableError(
        path,
        f"it has {pixels} pixels; expected at most {limit:,}",
        f"photograph {shortened(path)} has {pixels} pixels; expected at most {limit:,}: make it smaller.",
    )


def _raw(path: Path) -> UnusableError:
    return UnusableError(path, "it is a camera raw file, to be exported as JPEG, PNG or TIFF first")


def _is_raw(image: Any) -> bool:
    """Whether an opened TIFF is a camera's raw file under another name: a DNG, or one that begins with its preview."""
    tags = image.tag_v2
    # DNGVersion; else NewSubfileType of a reduced picture, with the full one in a sub-directory (TIFF/EP).
    return 50706 in tags or (tags.get(254) == 1 and 330 in tags)


def _import_plugin(content: Content | None) -> None:
    """Teach Pillow the format of a file by a plugin, where one is installed. The whole process has it from then on."""
    Image.init()
    name = content.readable if content else ""
    if name not in _PLUGINS or name in Image.OPEN:
        return
    try:
        plugin = importlib.import_module(_PLUGINS[name])
        if name == "HEIF":  # the others register themselves when they are imported
            plugin.register_heif_opener()
    except Exception:  # it is not there, or its libraries do not load: the file is named as one that cannot be read
        return


def _readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()  # Image.OPEN is filled lazily
    return [name for name in FORMATS if name in Image.OPEN]


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


def _plain_mode(image: Image.Image, full_scale: int, inverted: bool) -> Image.Image:
    """An image of any mode as L, LA, RGB, RGBA or CMYK with 8 bits a channel, its values in the file's colour space.

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
    if image.mode == "LA":
        return image
    if image.has_transparency_data:
        grey = image.mode in ("1", "L")
        image = image.convert("RGBA")
        return Image.merge("LA", (image.getchannel("R"), image.getchannel("A"))) if grey else image
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """A picture as RGB, alpha composited on white, metadata dropped."""
    if image.mode in ("LA", "RGBA"):
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


def _reason(path: Path, content: Content | None, error: Exception) -> str:
    """Why a file could not be read, as the end of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "it is empty"
        if content is None:
            return "it is damaged, or no image of a format that is read here"
        if content is RAW:
            return "it is a camera raw file, to be exported as JPEG, PNG or TIFF first"
        if content.readable in _readable_formats():
            return f"it is {content.name}, but damaged"
        return f"it is {content.name}" + (f"; {content.advice}" if content.advice else "")
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the system's own words: permission denied, input/output error
    reason = shortened(error).rstrip(".") or type(error).__name__
    return reason if isinstance(error, ValueError) else f"it is damaged or cut off ({reason})"
