"""Pictures of a run: contact sheets of samples and plots of the losses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .files import replacing
from .sampling import clamp_finite
from .training.events import CheckpointSaved, Event, PreviewReady, StepDone
from .training.run import Run


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as B 8-bit RGB pictures. Raises DivergedError for NaN and infinity."""
    images = clamp_finite(images.float())
    return [to_pil_image(pixels) for pixels in ((images + 1) * 127.5).round().to("cpu").byte()]


def contact_sheet(images: Tensor, columns: int = 4) -> Image.Image:
    """One picture of images (B, 3, H, W) in [-1, 1], in rows of `columns`, with white gaps of 4 pixels.

    Raises DivergedError for NaN and infinity.
    """
    return to_pictures(make_grid(images.float().cpu(), nrow=columns, padding=4, pad_value=1.0)[None])[0]


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of the path's suffix (PNG without a suffix), lossy ones at quality 90.

    Raises StorageError if it cannot be written.
    """
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with replacing(path) as temporary:
        picture.save(temporary, format=kind, quality=90)


def plot_losses(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Write a PNG file with one panel per loss. The axis is logarithmic if all values of a loss are positive.

    rows: as Run.read_log returns them. Nothing is written if they hold no loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in dict.fromkeys(key for row in rows for key in row) if n != "step"]
    if not names:
        return
    columns = 4
    lines = -(-len(names) // columns)
    height = 2.2 * lines + 0.4
    figure = Figure(figsize=(3.2 * columns, height))
    FigureCanvasAgg(figure)
    # Fixed margins in inches, because matplotlib's layout engines would take most of the plot's time.
    figure.subplots_adjust(0.06, 0.3 / height, 0.99, 1 - 0.7 / height, wspace=0.3, hspace=0.4)
    figure.suptitle(title, y=1 - 0.2 / height)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        # A line through one point would be invisible.
        marker = "." if len(points) == 1 else ""
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=0.8, marker=marker)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        if all(y > 0 for _, y in points):
            axes.set_yscale("log")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


class RunPictures:
    """A listener that writes a run's contact sheets and loss plots.

    A plot takes 1 to 2 s. It is drawn at the first checkpoint, at the end of a stage, and at other checkpoints while
    plotting takes at most 2 % (SHARE) of the time.
    """

    SHARE = 0.02

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder
        self._is_last = False
        self._next = 0.0  # earliest time of the next plot, in seconds of time.monotonic

    def __call__(self, event: Event) -> None:
        """Write the contact sheet of a preview, or the loss plot at a checkpoint."""
        if isinstance(event, StepDone):
            self._is_last = event.step == event.iterations
        elif isinstance(event, PreviewReady):
            path = self.folder / event.stage / "samples" / f"step_{event.step:06d}.png"
            save_picture(path, contact_sheet(event.images))
        elif isinstance(event, CheckpointSaved) and (self._is_last or time.monotonic() >= self._next):
            began = time.monotonic()
            rows = Run(self.folder, {}).read_log(event.stage)
            plot_losses(rows, self.folder / event.stage / "losses.png", f"{self.folder.name}: {event.stage}")
            self._next = time.monotonic() + (time.monotonic() - began) / self.SHARE
