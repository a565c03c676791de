"""Where a run goes on from, and whether it is still the same run."""

from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import find_resume_point, step_of, verify_checkpoint
from train.record import run_status

MAY_CHANGE = (
    *("run_dir", "resume", "checkpoint_every", "keep_checkpoints", "config"),
    *("data.path", "data.num_workers", "trainer.max_steps", "trainer.val_check_interval"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.devices"),
    *("trainer.num_nodes", "trainer.strategy", "trainer.accelerator", "trainer.max_time"),
    "trainer.accumulate_grad_batches",  # the global batch stays what it is
)


def choose_resume_point(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from; None to start. Errors before anything is written."""
    if resume == "auto":
        return find_resume_point(run_dir / "checkpoints")
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


def check_unchanged(saved: Path, config: dict[str, Any]) -> None:
    """Raise ValueError with a field-by-field diff if `config` is not the run's own."""
    before = _flat(yaml.safe_load(saved.read_text()))
    now = _flat(config)
    changes = [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changes:
        lines = "\n".join(changes)
        raise ValueError(f"the configuration differs from that of the run in {saved}:\n{lines}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat
