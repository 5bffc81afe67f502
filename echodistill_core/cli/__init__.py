"""The command line: demo, bench, train, echo, sample, info, export, download."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import EchoDistillError
from .arguments import build_parser, parse

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed while computing, 2 input that has to be mended."""
    goes_on = False
    try:
        options = parse(build_parser(), arguments)
        goes_on = options.command in ("demo", "bench", "train", "echo")
        return run(options)
    except EchoDistillError as error:
        print(f"echodistill: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader of our output, `head` say, has read enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        what_now = "; the same command goes on from the last checkpoint" if goes_on else ""
        print(f"echodistill: interrupted{what_now}.", file=sys.stderr)
        return INTERRUPTED


def _wait_without_spinning() -> None:
    """Let threads that wait for others sleep after 1000 turns in place of 300000, before torch loads its OpenMP.

    Spinning threads take the cores that the others need: beside two busy programs on two cores, training took twice as
    long (docs/results.md). A user's own setting wins. OpenMP libraries other than GNU's do not read this.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run(options: argparse.Namespace) -> int:
    """Carry out parsed options. The commands' imports take seconds, so --help and mistakes do not wait for them."""
    if options.command == "demo":
        print("starting", file=sys.stderr)  # or a newcomer would wonder for those seconds

    _wait_without_spinning()
    import torch

    from . import commands
    from .progress import shown_warnings

    try:
        with shown_warnings():
            getattr(commands, options.command)(options)
    except torch.OutOfMemoryError as error:
        if isinstance(error, EchoDistillError):  # training's own, which says what to change
            raise
        raise EchoDistillError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); a smaller --batch, a smaller --width and "
            "--height or --precision bf16 takes less."
        ) from error
    return 0
