"""`compare --tensorboard`: runs and gaps in one TensorBoard folder, laid out to overlay."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

CURVES = {"train": "train/loss", "val": "val/loss", "train_gap": "train/gap", "val_gap": "val/gap"}
BAND = ["gap/mean", "gap/low", "gap/high"]
RESULTS = {"final/val_loss": "val_loss", "final/gap": "gap"}
LAYOUT = {
    "lowbit compare": {
        "val loss": ["Multiline", ["^val/loss$"]],
        "train loss, smoothed": ["Multiline", ["^train/loss$"]],
        "val gap to the baseline": ["Multiline", ["^val/gap$"]],
        "mean gap, 95 % interval": ["Margin", BAND],
    }
}
Point = tuple[str, float, int]


def check_overlay(out: Path) -> None:
    """Raise FileExistsError where `out`/tensorboard holds anything but events."""
    files = (path for path in (out / "tensorboard").rglob("*") if not path.is_dir())
    if foreign := [path for path in files if not path.name.startswith("events.out.tfevents.")]:
        raise FileExistsError(f"{foreign[0]} is not ours: move it away, or choose another --out")


def write_overlay(document: dict[str, Any], out: Path) -> None:
    """A folder per run and per mean gap under `out`/tensorboard; the x-axis is in tokens.

    What an earlier call left there is replaced.
    """
    check_overlay(out)
    folder = out / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars(LAYOUT)
    rows = zip(document["runs"], document["curves"], document["run_ids"], strict=True)
    for row, curves, name in rows:
        points = [point for key, curve in curves.items() for point in _points(CURVES[key], curve)]
        results = {tag: row[key] for tag, key in RESULTS.items() if row[key] is not None}
        points += [(tag, value, row["tokens"]) for tag, value in results.items()]
        settings = {"recipe": row["label"], "seed": row["seed"], "control": row["control"] or "no"}
        metrics = dict.fromkeys(RESULTS, 0.0)  # their names; values are scalars below
        summaries = hparams(settings, metrics)  # type: ignore[no-untyped-call]  # torch's
        with SummaryWriter(str(folder / name.replace(" ", "-"))) as writer:
            for summary in summaries:
                writer.file_writer.add_summary(summary)
            _write(writer, points)
    for band in document["bands"]:
        with SummaryWriter(str(folder / f"mean-{band['label']}")) as writer:
            for tag in BAND:
                values = band[tag.removeprefix("gap/")]
                _write(writer, _points(tag, {"tokens": band["tokens"], "values": values}))


def _points(tag: str, curve: dict[str, list[Any]]) -> list[Point]:
    both = zip(curve["tokens"], curve["values"], strict=True)
    return [(tag, value, tokens) for tokens, value in both]


def _write(writer: SummaryWriter, points: Iterable[Point]) -> None:
    for tag, value, tokens in points:
        writer.add_scalar(tag, value, tokens)
