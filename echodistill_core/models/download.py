"""Downloads the entries of hub.py: plan, describe, download. No other module opens a connection.

plan() queries the hub for names and sizes; describe() is the text for the user's consent; download() puts the files
into huggingface_hub's cache, which other tools share. huggingface_hub does the transfer: progress bars, reuse of
complete files, resuming by Range requests, mirrors by endpoint. Its recent versions resume within one call only and
restart a file after the process ended; older versions resume in the next call.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import EchoDistillError, InputError, StorageError
from .hub import HUB, HubFiles, cached_file, cached_folder, expand, matching_files

# Without a timeout, a host that drops packets blocks until the operating system gives up.
TIMEOUT_S = 10.0
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
MIRROR = "point HF_ENDPOINT or --endpoint at a mirror"

# The bases of HfHubHTTPError are those of the HTTP library, which changed between versions of huggingface_hub
# (requests, httpx, httpx2); they also cover its transport errors. Xet, the hub's storage, raises RuntimeError; a mirror
# whose answer is not JSON causes a ValueError.
_FAILURES = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class PlannedFile:
    """One file of a download: `name` is its entry in HUB, `file` its path in the repository.

    size_bytes: 0 where a mirror does not report it. cached: whether a file of this size is in the hub cache.
    """

    name: str
    repo: str
    file: str
    size_bytes: int
    licence: str
    cached: bool


def plan(names: Iterable[str], endpoint: str | None = None, cache_dir: str | Path | None = None) -> list[PlannedFile]:
    """List the files of these bundles and names of HUB, with the sizes that the hub reports. Downloads nothing.

    endpoint: URL of a hub or mirror; None for HF_ENDPOINT or huggingface.co.
    Raises InputError for an unknown name, a hub that cannot be reached or lacks a repository, and a repository whose
    weights are a pickle only.
    """
    url = _checked_endpoint(endpoint)
    planned = []
    for name in expand(names):
        entry = HUB[name]
        with _explaining_errors(url, entry.repo, cache_dir):
            info = HfApi(endpoint=url).model_info(
                entry.repo, revision=entry.revision, files_metadata=True, timeout=TIMEOUT_S
            )
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        here = {file for file in sizes if _is_cached(name, file, sizes[file], info.sha, cache_dir)}
        needed: dict[str, None] = {}
        for wanted in entry.files:
            found = matching_files(wanted, sizes)
            if not found:
                raise _missing_file(url, entry, wanted, sizes)
            # A cached full-precision file is preferred to downloading half precision.
            needed.update(dict.fromkeys(next((files for files in found if here.issuperset(files)), found[0])))
        planned += [PlannedFile(name, entry.repo, file, sizes[file], entry.licence, file in here) for file in needed]
    return planned


def describe(planned: Sequence[PlannedFile]) -> str:
    """The table to print before a download: size in MB (10^6 bytes), file and licence, totals, notes on licences."""
    rows = [
        (_megabytes(f.size_bytes), f"{f.repo}/{f.file}", f.licence + (" (already here)" if f.cached else ""))
        for f in planned
    ]
    rows.insert(0, ("MB", "file", "licence"))
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    total = sum(f.size_bytes for f in planned)
    here = sum(f.size_bytes for f in planned if f.cached)
    lines = [f"{size:>{left}}  {file:<{middle}}  {licence}" for size, file, licence in rows]
    lines.append(
        f"{len(planned)} files, {_megabytes(total)} MB: {_megabytes(here)} MB already here, "
        f"{_megabytes(total - here)} MB to download."
    )
    notes = dict.fromkeys((f.repo, f.licence, HUB[f.name].licence_note) for f in planned)
    lines += [f"{repo}: {licence}; {note}." for repo, licence, note in notes]
    return "\n".join(lines)


def download(
    planned: Sequence[PlannedFile], endpoint: str | None = None, cache_dir: str | Path | None = None
) -> dict[str, Path]:
    """Download the planned files that the hub cache lacks; return the complete folder of each name.

    planned: from plan(), with all files of each name. endpoint, cache_dir: as for plan().
    Raises InputError where the hub cannot be reached or lacks a file, StorageError where the files cannot be written.
    Files completed before an error are kept.
    """
    url = _checked_endpoint(endpoint)
    _check_space(sum(f.size_bytes for f in planned if not f.cached), cache_dir)
    for f in planned:
        with _explaining_errors(url, f.repo, cache_dir):
            # Also for cached files: the hub then only confirms that they are current.
            hf_hub_download(
                f.repo,
                f.file,
                revision=HUB[f.name].revision,
                endpoint=url,
                cache_dir=_cache(cache_dir),
                etag_timeout=TIMEOUT_S,
            )
    folders = {}
    for name in dict.fromkeys(f.name for f in planned):
        folder = cached_folder(name, cache_dir)
        if folder is None:
            raise InputError(
                f"{HUB[name].repo} changed on the hub while it was downloaded, so its files do not belong together; "
                "run the download again."
            )
        folders[name] = folder
    return folders


def _megabytes(size_bytes: int) -> str:
    return "<0.1" if 0 < size_bytes < 5e4 else f"{size_bytes / 1e6:.1f}"


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser().absolute()


def _is_cached(name: str, file: str, size: int, commit: str | None, cache_dir: str | Path | None) -> bool:
    """Whether the cache has this file with this size (0: any), in this commit or in the branch's last known state.

    A new commit on a branch often leaves the file unchanged; download() then links it without a transfer.
    """
    copies = (cached_file(name, file, cache_dir, revision) for revision in (commit, None))
    return any(copy is not None and size in (0, copy.stat().st_size) for copy in copies)


def _check_space(needed: int, cache_dir: str | Path | None) -> None:
    """Raise StorageError if the cache's disk has less than `needed` bytes free."""
    cache = _cache(cache_dir)
    try:
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    except OSError:  # Free space is unknown; writing reports the error.
        return
    if needed > free:
        raise StorageError(
            f"the download needs {_megabytes(needed)} MB but the disk of {cache} has {_megabytes(free)} MB free; "
            "free some, or set HF_HOME to a folder on another disk."
        )


def _checked_endpoint(endpoint: str | None) -> str:
    """The endpoint's URL without a trailing slash. Raises InputError where it is not an http(s) URL."""
    url = (endpoint or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"the hub's endpoint is {url!r}; expected a URL such as https://huggingface.co.")
    return url


def _missing_file(url: str, entry: HubFiles, wanted: str, present: Iterable[str]) -> InputError:
    """The error for a pattern without a match: the weights are a pickle only, or absent."""
    plain = PurePosixPath(wanted.split("|")[-1])
    pickles = [p for p in present if PurePosixPath(p).parent == plain.parent and p.endswith(PICKLES)]
    if plain.suffix == ".safetensors" and pickles:
        return InputError(
            f"{entry.repo} (revision {entry.revision}) at {url} has its weights only as a pickle ({pickles[0]}), which "
            f"can run code when opened and is never downloaded; convert it to {plain.name} with "
            "https://huggingface.co/spaces/safetensors/convert, or with transformers' "
            "save_pretrained(..., safe_serialization=True) where you trust the file, and give that folder instead."
        )
    return InputError(
        f"{entry.repo} (revision {entry.revision}) at {url} has no {wanted.replace('|', ' or ')}; "
        f"its layout changed or the copy is incomplete, so {MIRROR} that has it."
    )


@contextmanager
def _explaining_errors(url: str, repo: str, cache_dir: str | Path | None) -> Iterator[None]:
    """Convert the hub client's exceptions into an InputError or StorageError that names the remedy."""
    try:
        yield
    except _FAILURES as error:
        raise _explained(error, url, repo, cache_dir) from error


def _explained(error: Exception, url: str, repo: str, cache_dir: str | Path | None) -> EchoDistillError:
    # hf_hub_download reports a failed connection as "not found locally"; its __cause__ is the reason.
    reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(reason, OfflineModeIsEnabled):
        return InputError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset both to download {repo}.")
    if isinstance(reason, GatedRepoError):
        return InputError(
            f"{url} gives {repo} only to users who accepted its terms; accept them on its page, log in with "
            f"`hf auth login`, or {MIRROR}."
        )
    if isinstance(reason, RepositoryNotFoundError):
        return InputError(f"{url} has no repository {repo}, or keeps it private; {MIRROR} that has it.")
    if isinstance(reason, RevisionNotFoundError):
        return InputError(f"{url} has {repo} but not the revision that is needed; {MIRROR} that has it.")
    if isinstance(reason, EntryNotFoundError) and not isinstance(reason, LocalEntryNotFoundError):
        return InputError(f"{url} lists a file of {repo} that it does not have; run it again, or {MIRROR}.")
    text = str(reason).strip() or type(reason).__name__
    full = "No space left on device" in text  # Xet's errors have no errno.
    numbered = isinstance(reason, OSError) and reason.errno is not None
    if full or (numbered and not isinstance(reason, (ConnectionError, TimeoutError))):
        return StorageError(
            f"cannot write {repo} to the hub cache {_cache(cache_dir)} ({text.splitlines()[0]}); "
            "free some space there, or set HF_HOME to a folder on another disk that you may write to."
        )
    return InputError(
        f"could not get {repo} from {url} ({text.splitlines()[0]}); check the connection and run it again, "
        f"which keeps finished files, or {MIRROR}."
    )
