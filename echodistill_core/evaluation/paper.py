"""What the paper measured and claims, as data: figures by method, its tables, and the orderings to compare with ours.

Figures are those of DreamBench in the authors' protocol (`metrics.PROTOCOLS`): with other encoders and other pictures
only their order can be compared, never their size. A method's id is the bench's; "<id>@best" is the same baseline with
the number of iterations at which it does best.
"""

from __future__ import annotations

from dataclasses import dataclass

BEST = "@best"


@dataclass(frozen=True)
class Figure:
    """The paper's row of one method; None where it gives no figure. table: the paper's, "" where unnamed here.

    measured_here: whether the bench has this method at all.
    """

    method: str
    title: str
    table: str
    clip_t: float | None = None
    clip_i: float | None = None
    dino: float | None = None
    measured_here: bool = True

    def value(self, metric: str) -> float | None:
        """The figure of "clip_t", "clip_i" or "dino"; None for every other metric."""
        return getattr(self, metric) if metric in ("clip_t", "clip_i", "dino") else None


FIGURES: dict[str, Figure] = {
    figure.method: figure
    for figure in (
        Figure("echodistill", "EchoDistill, before echo", "1", 0.252, 0.783, 0.637),
        Figure("echodistill-echo", "EchoDistill, after echo", "1", 0.236, 0.798, 0.673),
        Figure("custom-diffusion-teacher", "Custom Diffusion on the teacher, 25 steps", "1", 0.269, 0.752, 0.519),
        Figure("textual-inversion", "Textual Inversion", "1", 0.252, 0.564, 0.166),
        Figure("custom-diffusion", "Custom Diffusion", "1", 0.205, 0.518, 0.058),
        Figure("dreambooth", "DreamBooth", "1", 0.188, 0.536, 0.111),
        Figure("lora", "LoRA", "1", 0.212, 0.585, 0.160),
        Figure("teacher-first", "Teacher first, then distilled", "1", 0.266, 0.725, 0.503),
        Figure("cones-2", "Cones 2", "1", 0.273, 0.619, 0.204, measured_here=False),
        Figure("textboost", "TextBoost", "1", 0.217, 0.570, 0.167, measured_here=False),
        Figure("disenbooth", "DisenBooth", "1", 0.251, 0.564, 0.231, measured_here=False),
        Figure("ip-adapter", "IP-Adapter (TCD)", "1", 0.204, 0.628, 0.325, measured_here=False),
        Figure("no-teacher", "without teacher", "3", 0.240, 0.719, 0.505),
        Figure("no-critics", "without critics", "3", 0.200, 0.566, 0.105),
        Figure("steps-2", "EchoDistill, 2 steps", "3", 0.255, 0.783, 0.635),
        Figure("steps-4", "EchoDistill, 4 steps", "3", 0.256, 0.772, 0.610),
        Figure("echodistill-teacher", "teacher before echo, 25 steps", "3"),
        Figure("echodistill-echo-teacher", "teacher after echo, 25 steps", "3", 0.265, 0.764, 0.571),
        Figure("no-identity", "without identity", "8", 0.248, 0.769, 0.618),
        Figure("no-mse", "without latent MSE", "8", 0.242, 0.739, 0.528),
        Figure("no-swd", "without MS-SWD", "8", 0.249, 0.754, 0.553),
        Figure("no-dino", "without the DINO v1 critic", "8", 0.231, 0.689, 0.441),
        Figure("no-dinov2", "without the DINO v2 critic", "8", 0.246, 0.736, 0.534),
        Figure("no-clip", "without the CLIP critic", "8", 0.227, 0.678, 0.409),
        Figure("one-photograph", "one photograph", "9", 0.231, 0.713, 0.470),
        Figure("not-shared", "text encoder not shared", "H", 0.242, 0.742, 0.551),
        Figure("hyper-sd", "Hyper-SD 1.5 student, SD 1.5 teacher", "", 0.211, 0.709, 0.463, measured_here=False),
    )
}

ONE_STEP_BASELINES = ("textual-inversion", "custom-diffusion", "dreambooth", "lora", "teacher-first")
BASELINES = ("custom-diffusion-teacher", *ONE_STEP_BASELINES)
ABLATIONS = ("no-teacher", "no-critics", "no-identity", "no-mse", "no-swd", "no-dino", "no-dinov2", "no-clip")
REFERENCES = ("before-training", "photographs")
# Methods that the paper does not have.
OWN_TITLES = {
    "before-training": "the student before training",
    "photographs": "real photographs of the concept",
    "tuned": "tuned, before echo",
    "tuned-echo": "tuned, after echo",
    "trial-paper": "the paper's settings",
    "trial-swd-range": "MS-SWD of sRGB in [0, 1]",
    "trial-normalisation": "backbones with their own normalisation",
    "trial-critic-clip": "critics' gradients clipped at 1",
    "trial-cosine": "rates that fall to zero along a cosine",
    "trial-critics-2": "critics in every other iteration",
    "trial-batch-4": "4 images an iteration instead of 2",
    "trial-mended": "all departures of the reference mended",
    "trial-normalised-critics-2": "own normalisation, and critics in every other iteration",
    "trial-tuned": "the preset tuned: own normalisation, images in every third iteration",
    "trial-images-4": "tuned, with images in every fourth iteration",
    "trial-images-5": "tuned, with images in every fifth iteration",
    "trial-tuned-critics": "tuned, critics at three times their rate",
    "trial-tuned-fast": "tuned, critics at three times and student at 1.4 times their rate",
    "trial-one-paper": "one photograph, the paper's settings",
    "trial-one-augment": "one photograph, augmented",
    "trial-one-cosine": "one photograph, rates along a cosine",
    "trial-one-tuned": "one photograph, the preset tuned",
}


@dataclass(frozen=True)
class Table:
    """One table of the report: its heading, a line on what it asks, and its methods in order."""

    key: str
    title: str
    question: str
    methods: tuple[str, ...]


def _with_best(methods: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for method in methods for name in (method, method + BEST))


TABLES: tuple[Table, ...] = (
    Table(
        "1",
        "Table 1: EchoDistill and the baselines",
        "One step each, unless said otherwise. Every method has the same photographs and the same number of "
        "iterations; the baselines again with the number at which they do best.",
        (
            "echodistill",
            "echodistill-echo",
            *_with_best(BASELINES),
            *(f.method for f in FIGURES.values() if f.table == "1" and not f.measured_here),
            *REFERENCES,
        ),
    ),
    Table(
        "3",
        "Table 3: teacher, critics, inference steps, echo",
        "What each player brings, whether more steps help, and what the echo does to student and teacher.",
        (
            "echodistill",
            "no-teacher",
            "no-critics",
            "steps-2",
            "steps-4",
            "echodistill-echo",
            "echodistill-teacher",
            "echodistill-echo-teacher",
        ),
    ),
    Table(
        "8",
        "Table 8: the terms one by one",
        "EchoDistill before the echo, with one alignment term or one critic left out.",
        ("echodistill", "no-identity", "no-mse", "no-swd", "no-dino", "no-dinov2", "no-clip"),
    ),
    Table("9", "Table 9: one photograph", "The same training on one photograph.", ("echodistill", "one-photograph")),
    Table(
        "H",
        "Appendix H: the shared text encoder",
        "The student with a token of its own in place of the teacher's.",
        ("echodistill", "not-shared"),
    ),
    Table(
        "tuned",
        "Beyond the paper: tuned",
        "The paper's settings beside those of the preset tuned.",
        ("echodistill", "tuned", "echodistill-echo", "tuned-echo"),
    ),
)

TRIALS = Table(
    "trials",
    "Trials of settings",
    "One change each to the paper's settings, before the echo: what helps may become the preset tuned.",
    tuple(method for method in OWN_TITLES if method.startswith("trial-")),
)


@dataclass(frozen=True)
class Ordering:
    """A claim: `better` lies above `worse` by `metric`. row: the method in whose row of the tables it is told.

    strict: False where the paper claims only "at least as good".
    """

    better: str
    worse: str
    metric: str
    row: str
    strict: bool = True


def title_of(method: str) -> str:
    """The method in words, for tables and plots; its id where it is unknown."""
    name = method.removesuffix(BEST)
    title = FIGURES[name].title if name in FIGURES else OWN_TITLES.get(name, name)
    return f"{title}, best budget" if method.endswith(BEST) else title


def figure_of(method: str) -> Figure | None:
    """The paper's figures of a method; those of a baseline stand for both of its budgets. None where there are none."""
    return FIGURES.get(method.removesuffix(BEST))


def orderings() -> tuple[Ordering, ...]:
    """Every ordering of the paper that the bench can confirm or refute, in the order of the tables."""
    full, echo = "echodistill", "echodistill-echo"
    claims = [
        Ordering(full, worse, metric, worse)
        for worse in _with_best(ONE_STEP_BASELINES)
        for metric in ("clip_i", "dino")
    ]
    claims += [
        Ordering(full, worse, metric, worse, strict=False)
        for worse in _with_best(("custom-diffusion-teacher",))
        for metric in ("clip_i", "dino")
    ]
    claims += [
        Ordering(full, worse, metric, worse)
        for worse in (*ABLATIONS, "one-photograph", "not-shared")
        for metric in ("clip_t", "clip_i", "dino")
    ]
    claims += [
        Ordering(echo, full, "dino", echo),
        Ordering(echo, full, "clip_i", echo),
        # What the echo costs: the paper's prompt fidelity falls from 0.252 to 0.236.
        Ordering(full, echo, "clip_t", echo),
        Ordering("echodistill-echo-teacher", "echodistill-teacher", "dino", "echodistill-echo-teacher"),
        # One step is the student's own number of steps: more of them change the picture little, and for the worse.
        Ordering(full, "steps-4", "dino", "steps-4"),
    ]
    return tuple(claims)
