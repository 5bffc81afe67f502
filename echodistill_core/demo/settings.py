"""The settings of a demo. Imports nothing slow, for --help."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_fields, setting


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The settings of a demo. Raises InputError for a value of the wrong type or outside its range."""

    concept: str = setting("", "which of the miniature's concepts to learn; empty takes dotted-mug")
    class_noun: str = setting("", "what your photographs show, in one or a few words: dog, coffee mug")
    iterations: int = setting(200, "iterations of the distillation stage", low=1)
    echo_iterations: int = setting(80, "iterations of the echoing stage", low=1)
    seed: int = setting(0, "of every random number", low=0, high=2**63 - 1)
    family: str = setting("miniature", "models; tiny is random, for trying the command", choices=("miniature", "tiny"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", affects_result=False)
    open: bool = setting(True, "show the page in the browser when it is written", affects_result=False)

    def __post_init__(self) -> None:
        check_fields(self)
