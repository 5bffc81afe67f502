"""Loggers of the package: children of "echodistill", silent until an application adds a handler.

    logging.getLogger("echodistill").setLevel("DEBUG")

INFO tells the course of a run: models, run folder, stages, checkpoints. DEBUG adds every file read and written.
`--verbose` of the command line shows both.
"""

from __future__ import annotations

import logging

NAME = "echodistill"

logging.getLogger(NAME).addHandler(logging.NullHandler())


def logger(module: str) -> logging.Logger:
    """The logger of a module by its `__name__`: "<pack>.echodistill_core.models.open" has "echodistill.models.open".

    ComfyUI imports the pack under the name of its folder, so everything up to the package's own name is dropped.
    """
    own = module.rpartition("echodistill_core")[2]
    return logging.getLogger(f"{NAME}{own}")
