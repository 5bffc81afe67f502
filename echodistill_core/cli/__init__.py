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
    """Run one command. Returns the exit status: 0 success, 1 failure while computing, 2 invalid input, 130 Ctrl-C."""
    _wait_without_spinning()
    resumes = False
    try:
        options = parse(build_parser(), arguments)
        resumes = options.command in ("demo", "bench", "train", "echo")
        return run(options)
    except EchoDistillError as error:
        print(f"echodistill: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader of the output, such as `head`, closed the pipe. Python would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        what_now = "; the same command goes on from the last checkpoint" if resumes else ""
        print(f"echodistill: interrupted{what_now}.", file=sys.stderr)
        return INTERRUPTED


def _wait_without_spinning() -> None:
    """Let waiting OpenMP threads sleep after 1000 spins in place of 300000. Call it before torch is imported.

    Spinning threads occupy cores that other processes need: beside two busy processes on two cores, training took twice
    as long (docs/results.md). Settings in the environment win. OpenMP libraries other than GNU's ignore the variable.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run(options: argparse.Namespace) -> int:
    """Run a command with parsed options. Its imports take seconds; --help and mistakes do not need them."""
    if options.command == "demo":
        print("starting", file=sys.stderr)  # the imports below take seconds

    import torch

    from . import commands
    from .progress import shown_logs, shown_warnings

    try:
        with shown_warnings(), shown_logs(options.verbose):
            getattr(commands, options.command)(options)
    except torch.OutOfMemoryError as error:
        if isinstance(error, EchoDistillError):  # raised by training, with advice
            raise
        raise EchoDistillError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); use a smaller --batch, a smaller "
            "--width and --height, or --precision bf16."
        ) from error
    return 0
