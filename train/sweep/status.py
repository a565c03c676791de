"""`lowbit sweep --status`: where every run stands, and when the last one will have ended."""

from datetime import timedelta
from statistics import median

from train.output.tables import aligned
from train.runs.lock import holder
from train.runs.record import has_record
from train.runs.run import Run, read_run
from train.sweep.request import PlannedRun

COLUMNS = ("run", "task", "state", "step", "of", "val loss", "s/step", "left")


def status_table(plan: list[PlannedRun], jobs: int = 1) -> str:
    """Times are estimated from the steps done; validation and start-up are not in them."""
    runs = [read_run(p.folder) if has_record(p.folder) else None for p in plan]
    speeds = [_seconds_per_step(run) if run else None for run in runs]
    lengths = [int(run.info["max_steps"]) for run in runs if run]
    rows, left = [], list[float | None]()
    for task, (planned, run, speed) in enumerate(zip(plan, runs, speeds, strict=True)):
        state = _state(planned, run)
        done = _steps(run) if run else 0
        of = int(run.info["max_steps"]) if run else max(lengths, default=0)
        if speed is None:  # not begun: as the other seeds, or else as any
            others = [(p, s) for p, s in zip(plan, speeds, strict=True) if s]
            alike = [s for p, s in others if p.variant == planned.variant]
            found = alike or [s for _, s in others]
            speed = median(found) if found else None
        ended = state in ("finished", "diverged")
        rest = 0.0 if ended else None if speed is None else (of - done) * speed
        left.append(rest)
        loss = run.val_curve[1][-1] if run and len(run.val_curve[1]) else None
        rows.append([
            planned.folder.name, str(task), state, str(done), str(of) if of else "?",
            "-" if loss is None else f"{loss:.4f}", "-" if speed is None else f"{speed:.2f}",
            "-" if ended else _duration(rest),
        ])  # fmt: skip
    known = None if None in left else sum(x for x in left if x) / jobs
    ended_runs = sum(row[2] in ("finished", "diverged") for row in rows)
    footer = f"{ended_runs} of {len(plan)} runs ended; left: {_duration(known)} with --jobs {jobs}"
    return "\n".join([*aligned([COLUMNS, *rows], left=(0, 2)), "", footer])


def _state(planned: PlannedRun, run: Run | None) -> str:
    if holder(planned.folder) is not None:
        return "running"
    if run is None:
        return "waiting"
    return "stopped" if run.status == "running" else run.status


def _steps(run: Run) -> int:
    return int(run.metrics["step"][-1]) if len(run.metrics["step"]) else 0


def _seconds_per_step(run: Run) -> float | None:
    speed = run.tokens_per_second
    data = run.info["data"]
    return data["global_batch_size"] * data["seq_len"] / speed if speed else None


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
