"""Small runs that must end the same wherever they are made, and a program that makes them in processes that are killed.

python resume_worker.py JOBS.json REPORTS.json      (POSIX: it forks)

JOBS is a list of {"folder": ..., "kills": [...]}. For each kill a process goes on with the run of that folder and is
killed with SIGKILL; then one goes on to the end. A kill is [operation, file, n], just before (or, for writes, in the
middle of) the n-th such operation on that file, or a number: the share of an undisturbed run's time. REPORTS holds
"undisturbed", every operation of an undisturbed run in JOBS[0]'s folder, and for each job, which kills hit.
"""

import builtins
import copy
import functools
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from echodistill_core.concept.photographs import Photograph
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.models.text import TextEncoder
from echodistill_core.settings import EchoSettings, TrainSettings, from_options
from echodistill_core.training import session

SOURCES = ModelSources(family="tiny")
ECHO = EchoSettings(iterations=3, pool_size=2, real_share=0.5)
DISTIL = {
    "class_noun": "dog",
    "iterations": 5,
    "batch_size": 1,
    "swd_projections": 8,
    "swd_levels": 2,
    "log_every": 1,
    "checkpoint_every": 2,  # so that kills also lose iterations that were logged already
    "preview_every": 0,
    "lr_decay": "cosine",
    "image_every": 2,
    "device": "cpu",
}


def settings(**overrides):
    return from_options(TrainSettings, {**DISTIL, **overrides})


def photographs():
    """Two photographs of noise, of the tiny family's own size."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return [Photograph(f"{i}.png", Image.fromarray(p)) for i, p in enumerate(pixels)]


@functools.cache
def opened_family():
    return open_family(SOURCES)


def fresh_family():
    """A tiny family that no run has touched. The tokenizer, which nothing changes, is shared: copying it is slow."""
    family = opened_family()
    tokenizer = family.text.tokenizer
    return copy.deepcopy(family, {id(tokenizer): tokenizer})


_with_placeholders = TextEncoder.with_placeholders
_prepared = {}


def with_placeholders(self, placeholders):
    """TextEncoder.with_placeholders, which copies a vocabulary each time, longer than an iteration here; now once."""
    plain = self._plain_tokenizer
    key = (id(plain), *placeholders.items())
    if key not in _prepared:
        _prepared[key] = _with_placeholders(self, placeholders)
    ready = _prepared[key]
    return copy.deepcopy(ready, {id(plain): plain, id(ready.tokenizer): ready.tokenizer, id(ready.model): self.model})


def ignore(event):
    pass


def complete(folder, family, listen=ignore):
    """Train both stages, from their last checkpoints."""
    # Results must not depend on the state of the global generators.
    torch.seed()
    np.random.seed()  # noqa: NPY002
    random.seed()
    run = session.train(photographs(), family, settings(), SOURCES, folder, listen)
    return session.echo(run, family, ECHO, listen)


class Disk:
    """Sees every change that this process makes below a folder, and kills it at one of them.

    Operations: mkdir; open, write (of a new file), append, sync, rename (onto the file), sync folder (right after the
    rename), unlink (of a leftover). Temporary files go by the name of the file they are to become.
    """

    def __init__(self, folder, kill=None):
        self.folder, self.kill = Path(folder), kill
        self.seen = Counter()
        self.synced = self.renamed = None
        self._open, self._fsync, self._replace = io.open, os.fsync, os.replace
        io.open = builtins.open = self.open
        os.fsync, os.replace = self.fsync, self.replace
        os.mkdir, os.unlink = self._before("mkdir", os.mkdir), self._before("unlink", os.unlink)

    def moment(self, operation, path, first=lambda: None):
        path = Path(os.fsdecode(path))
        if not path.is_relative_to(self.folder):
            return
        name = re.sub(r"\.(.+)\.\d+\.tmp", r"\1", path.name)
        key = (operation, (path.parent / name).relative_to(self.folder).as_posix() if path != self.folder else ".")
        self.seen[key] += 1
        if self.kill and (*key, self.seen[key]) == tuple(self.kill):
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, file, mode="r", *arguments, **named):
        if isinstance(file, int) or not set(mode) & set("wa+"):
            return self._open(file, mode, *arguments, **named)
        if mode == "r+b":
            self.synced = file
            return self._open(file, mode, *arguments, **named)
        self.moment("open", file)
        handle = self._open(file, mode, *arguments, **named)
        write = handle.write

        def watched(data):
            def half():
                write(bytes(data)[: len(data) // 2])
                handle.flush()

            self.moment("append" if "a" in mode else "write", file, half)
            return write(data)

        handle.write = watched
        return handle

    def fsync(self, handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.moment("sync folder", self.renamed)
        else:
            self.moment("sync", self.synced)
        self._fsync(handle)

    def replace(self, source, target):
        self.moment("rename", target)
        self._replace(source, target)
        self.renamed = target

    def _before(self, operation, function):
        def watched(path, *arguments, **named):
            self.moment(operation, path)
            return function(path, *arguments, **named)

        return watched


def in_a_process(folder, kill, duration):
    """Resume a run in a fork of this process. Returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        with Path(f"{folder}.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            disk = Disk(folder, kill if isinstance(kill, list) else None)
            complete(folder, opened_family())  # fresh in every fork
            if kill == "undisturbed":
                Path(f"{folder}.json").write_text(json.dumps([list(key) for key in disk.seen]))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill * duration)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise RuntimeError(Path(f"{folder}.txt").read_text())
    return -code


def work(task):
    folder, kills, duration = task
    hits = [in_a_process(folder, kill, duration) == signal.SIGKILL for kill in [*kills, None]]
    if any(hits) or not isinstance(kills[0], float):
        return hits
    # The run was done before its time came: the machine was busier while the duration was measured. Sooner, then.
    shutil.rmtree(folder)
    return work((folder, kills, 0.8 * duration))


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)  # other threads do not survive a fork
    TextEncoder.with_placeholders = with_placeholders
    for words in ({}, {settings().placeholder: settings().vectors}):
        opened_family().text.with_placeholders(words)
    # A collection in a fork would touch, and so copy, all the memory that it shares with this process.
    gc.disable()
    gc.freeze()
    began = time.monotonic()
    in_a_process(jobs[0]["folder"], "undisturbed", 0)
    duration = time.monotonic() - began
    with get_context("fork").Pool(2) as pool:
        hits = pool.map(work, [(job["folder"], job["kills"], duration) for job in jobs[1:]], chunksize=1)
    undisturbed = json.loads(Path(f"{jobs[0]['folder']}.json").read_text())
    Path(sys.argv[2]).write_text(json.dumps({"undisturbed": undisturbed, "hits": hits}))


if __name__ == "__main__":
    main()
