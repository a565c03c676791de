"""The microscope's measurements for TensorBoard: means, histograms, layer x depth images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lowbit.gradient_stats import STATISTICS
from lowbit.recipe import OPERANDS
from train.microscope.measuring import BINS, LARGEST_CREST
from train.microscope.store import Rows

IMAGES_EVERY = 10
"""Of the looks: drawing takes as long as measuring a small model; the Parquet files have each."""


class Board:
    """Writes to one SummaryWriter."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._looks = 0
        self._heats: dict[str, Heat] = {}

    def show(self, step: int, tables: Mapping[str, Rows], histograms: Mapping[str, Tensor]) -> None:
        """Means over the layers by operand and format; of gradients, over all layers."""
        operands, gradients = tables["operands"], tables.get("gradients", ())
        for (operand, format), rows in _grouped(operands, "operand", "format").items():
            for statistic in ("qsnr_db", "underflow", "crest"):
                tag = f"diagnostics_{statistic}/{operand}/{format}"
                self._add_mean(tag, rows, statistic, step)
        for statistic in STATISTICS if gradients else ():
            self._add_mean(f"diagnostics_gradients/{statistic}", gradients, statistic, step)
        for operand, counts in histograms.items():
            self._add_histogram(f"diagnostics_crest/{operand}/block_32", counts, step)
        if self._looks % IMAGES_EVERY == 0:
            self._draw(step, operands, gradients)
        self._looks += 1

    def _draw(self, step: int, operands: Rows, gradients: Rows) -> None:
        for (format,), rows in _grouped(operands, "format").items():
            image = self._heat(f"QSNR of {format} (dB)", rows).draw(rows, "qsnr_db", step)
            self._writer.add_image(f"diagnostics_qsnr_db/{format}", image, step, dataformats="HWC")
        if gradients:
            title = "gradient error |q - g| / |g|"
            rows = [row | {"operand": "of the weight"} for row in gradients]
            image = self._heat(title, rows).draw(rows, "relative_l2", step)
            self._writer.add_image("diagnostics_gradients/layers", image, step, dataformats="HWC")

    def _add_mean(self, tag: str, rows: Rows, statistic: str, step: int) -> None:
        """Over the rows that have the statistic: 2-D blocks have no crest factor."""
        found = [row[statistic] for row in rows if np.isfinite(row[statistic])]
        if found:
            self._writer.add_scalar(tag, float(np.mean(found)), step)

    def _heat(self, title: str, rows: Rows) -> "Heat":
        if title not in self._heats:
            self._heats[title] = Heat(title, rows)
        return self._heats[title]

    def _add_histogram(self, tag: str, counts: Tensor, step: int) -> None:
        edges = np.linspace(1.0, LARGEST_CREST, BINS + 1)
        middle, found = (edges[1:] + edges[:-1]) / 2, counts.numpy()
        self._writer.add_histogram_raw(
            tag, min=1.0, max=LARGEST_CREST, num=int(found.sum()), sum=float(found @ middle),
            sum_squares=float(found @ middle**2), bucket_limits=edges[1:].tolist(),
            bucket_counts=found.tolist(), global_step=step,
        )  # fmt: skip


class Heat:
    """One panel an operand, layer types over depth; laid out once, since that takes a second."""

    def __init__(self, title: str, rows: Rows) -> None:
        self._types = list(dict.fromkeys(row["type"] for row in rows))
        self._depths = sorted({row["depth"] for row in rows})
        found = {row["operand"] for row in rows}
        self._operands = [o for o in (*OPERANDS, "of the weight") if o in found]
        columns = min(3, len(self._operands))
        lines = -(-len(self._operands) // columns)
        width = 2.4 + columns * max(2.2, 0.16 * len(self._depths))
        self.figure = Figure(figsize=(width, 1.2 + lines * (0.6 + 0.24 * len(self._types))), dpi=90)
        self.figure.set_layout_engine("constrained")
        self._canvas = FigureCanvasAgg(self.figure)
        panels = self.figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        self._images = []
        for axes, operand in zip(panels.flatten(), self._operands, strict=False):
            empty = np.full((len(self._types), len(self._depths)), np.nan)
            self._images.append(axes.imshow(empty, aspect="auto", cmap="viridis", vmin=0, vmax=1))
            axes.set_title(operand, fontsize=10)
            axes.set_yticks(range(len(self._types)), self._types, fontsize=8)
            ticks = range(0, len(self._depths), max(1, len(self._depths) // 8))
            axes.set_xticks(ticks, [str(self._depths[i]) for i in ticks], fontsize=8)
        for axes in panels.flatten()[len(self._operands) :]:
            axes.set_axis_off()
        for axes in panels[-1][: len(self._operands)]:
            axes.set_xlabel("depth (block)", fontsize=9)
        bar = self.figure.colorbar(self._images[0], ax=panels.flatten().tolist())
        bar.ax.tick_params(labelsize=8)
        bar.set_label(" ", labelpad=24)  # room for the longer numbers of later steps
        self._heading = self.figure.suptitle(title, fontsize=10)
        self._title = title

    def draw(self, rows: Rows, statistic: str, step: int) -> NDArray[np.uint8]:
        """Pixels [height, width, 4] of the rows' values."""
        grids = np.full((len(self._operands), len(self._types), len(self._depths)), np.nan)
        for row in rows:
            place = self._types.index(row["type"]), self._depths.index(row["depth"])
            grids[self._operands.index(row["operand"]), *place] = row[statistic]
        finite = grids[np.isfinite(grids)]
        low, high = np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0)
        for image, grid in zip(self._images, grids, strict=True):
            image.set_data(grid)
            image.set_clim(low, max(high, low + 1e-9))
        self._heading.set_text(f"{self._title}, step {step}")
        self._canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib's
        self.figure.set_layout_engine("none")  # as it stands now
        return np.asarray(self._canvas.buffer_rgba())  # type: ignore[no-untyped-call]


def _grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
