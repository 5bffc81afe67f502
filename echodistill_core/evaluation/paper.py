"""The paper's results and claims as data: figures by method, its tables, and the orderings to compare with ours.

The figures were measured on DreamBench in the authors' protocol (`metrics.PROTOCOLS`). With other encoders and images
only their order is comparable. "<id>@best" is the baseline <id> with its best number of iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

BEST = "@best"


@dataclass(frozen=True)
class Figure:
    """The paper's row of one method; a figure that the paper does not give is None.

    table: the paper's table, "" for rows of no table here. measured_here: whether the bench has this method.
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
    "trial-cosine": "learning rates with cosine decay to zero",
    "trial-critics-2": "critics in every other iteration",
    "trial-batch-4": "4 images an iteration instead of 2",
    "trial-mended": "all deviations of the reference code corrected",
    "trial-normalised-critics-2": "own normalisation, and critics in every other iteration",
    "trial-tuned": "the preset tuned: own normalisation, images in every third iteration",
    "trial-images-4": "tuned, with images in every fourth iteration",
    "trial-images-5": "tuned, with images in every fifth iteration",
    "trial-tuned-critics": "tuned, critics' learning rate times 3",
    "trial-tuned-fast": "tuned, learning rates of critics times 3 and student times 1.4",
    "trial-one-paper": "one photograph, the paper's settings",
    "trial-one-augment": "one photograph, augmented",
    "trial-one-cosine": "one photograph, cosine decay",
    "trial-one-tuned": "one photograph, the preset tuned",
}


@dataclass(frozen=True)
class Table:
    """One table of the report. key: its short id. question: the sentence under its title. methods: ids in order."""

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
        "One sampling step, unless the row says otherwise. Every method has the same photographs and number of "
        "iterations; each baseline is repeated with its best number of iterations.",
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
        "The effect of teacher and critics, of more sampling steps, and of the echo on student and teacher.",
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
        "The student with a separate token embedding instead of the teacher's.",
        ("echodistill", "not-shared"),
    ),
    Table(
        "tuned",
        "Beyond the paper: tuned",
        "The paper's settings and those of the preset tuned.",
        ("echodistill", "tuned", "echodistill-echo", "tuned-echo"),
    ),
)

TRIALS = Table(
    "trials",
    "Trials of settings",
    "Single changes to the paper's settings, before the echo. The preset tuned was chosen from them.",
    tuple(method for method in OWN_TITLES if method.startswith("trial-")),
)


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: `better` has a higher `metric` than `worse`. row: the method whose table row shows it.

    strict: False where the paper claims only "at least as good".
    """

    better: str
    worse: str
    metric: str
    row: str
    strict: bool = True


def title_of(method: str) -> str:
    """The method's name for tables and plots; the id itself for an unknown method."""
    name = method.removesuffix(BEST)
    title = FIGURES[name].title if name in FIGURES else OWN_TITLES.get(name, name)
    return f"{title}, best budget" if method.endswith(BEST) else title


def figure_of(method: str) -> Figure | None:
    """The paper's figures of a method, None without any. Both budgets of a baseline have the same figures."""
    return FIGURES.get(method.removesuffix(BEST))


def orderings() -> tuple[Ordering, ...]:
    """All orderings of the paper that the bench can check, in the order of the tables."""
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
        # The echo lowers prompt fidelity: from 0.252 to 0.236 in the paper.
        Ordering(full, echo, "clip_t", echo),
        Ordering("echodistill-echo-teacher", "echodistill-teacher", "dino", "echodistill-echo-teacher"),
        # The student is distilled for one step: more steps change its images little, and lower DINO.
        Ordering(full, "steps-4", "dino", "steps-4"),
    ]
    return tuple(claims)
