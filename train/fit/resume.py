"""Where a run goes on from, and whether it is still the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoints.folder import (
    complete_checkpoints,
    find_resume_point,
    rename_aside,
    step_of,
    sweep_leftovers,
    verify_checkpoint,
)
from train.config.strict_yaml import load_yaml
from train.runs.record import run_status

MAY_CHANGE = (
    *("run_dir", "resume", "checkpoint_every", "keep_checkpoints", "disk_full", "config"),
    *("diagnostics", "collective_timeout", "data.path", "data.num_workers", "trainer.max_steps"),
    *("trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"),
    *("trainer.max_time", "trainer.accumulate_grad_batches"),  # the global batch stays what it is
    "model.gradient_checkpointing",  # the same bits
)


def choose_resume_point(run_dir: Path, resume: str, *, is_writer: bool = True) -> Path | None:
    """The checkpoint to go on from; None to start. Errors before anything is written.

    Only the writer, which holds the run's lock, tidies the folder; other ranks come to the same
    answer by looking.
    """
    folder = run_dir / "checkpoints"
    if is_writer:
        sweep_leftovers(folder)
    if resume == "auto":
        return find_resume_point(folder, set_aside=is_writer)
    if resume == "never":
        if run_status(run_dir) is not None:
            raise ValueError(f"{run_dir} holds a run and --resume is never: choose another run_dir")
        return None
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume {resume}: there is no such checkpoint folder")
    step_of(path)
    verify_checkpoint(path)
    return path


def set_later_aside(run_dir: Path, point: Path) -> None:
    """A run that goes back to an older checkpoint leaves the later ones behind, under a name."""
    for path in complete_checkpoints(run_dir / "checkpoints"):
        if step_of(path) > step_of(point):
            print(f"lowbit: {path} set aside as {rename_aside(path, 'superseded')}", flush=True)


def check_origin(point: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError unless the checkpoint is of this recipe and this data."""
    for key in ("recipe", "data_fingerprint"):
        if saved.get(key) != now[key]:
            raise ValueError(
                f"{point} is not of this run: its {key} is\n  {_short(saved.get(key))}\nand this "
                f"run's is\n  {_short(now[key])}"
            )


def check_unchanged(saved: Path, config: dict[str, Any]) -> None:
    """Raise ValueError with a field-by-field diff if `config` is not the run's own."""
    before = _flat(load_yaml(saved.read_text()))
    now = _flat(config)
    changes = [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key)
    ]
    if changes:
        lines = "\n".join(changes)
        raise ValueError(f"the configuration differs from that of the run in {saved}:\n{lines}")


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."
