"""`lowbit sweep --status`: where every run stands, and when the last one will have ended."""

from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from train.output.tables import aligned
from train.runs.lock import holder
from train.runs.record import has_record
from train.runs.run import Run, read_run
from train.sweep.request import PlannedRun

COLUMNS = ("run", "task", "state", "step", "of", "val loss", "s/step", "left")
FIRST_STEPS = 5  # before a speed is worth a word
LONG = 1800.0  # seconds


@dataclass(frozen=True)
class _Standing:
    """Where one run of the plan stands."""

    planned: PlannedRun
    run: Run | None
    state: str
    done: int  #: steps
    of: int  #: steps in all; 0 where no run of the sweep says it yet
    speed: float | None  #: seconds a step, its own or that of runs like it

    @property
    def left(self) -> float | None:
        """Seconds."""
        if self.state in ("finished", "diverged"):
            return 0.0
        return None if self.speed is None else (self.of - self.done) * self.speed


def status_table(plan: list[PlannedRun], jobs: int = 1) -> str:
    """Times are estimated from the steps done; validation and start-up are not in them."""
    standings, rows = _standings(plan), []
    for task, one in enumerate(standings):
        loss = one.run.val_curve[1][-1] if one.run and len(one.run.val_curve[1]) else None
        rows.append([
            one.planned.folder.name, str(task), one.state, str(one.done),
            str(one.of) if one.of else "?", "-" if loss is None else f"{loss:.4f}",
            "-" if one.speed is None else f"{one.speed:.2f}",
            "-" if one.left == 0.0 else duration(one.left),
        ])  # fmt: skip
    ended = sum(one.state in ("finished", "diverged") for one in standings)
    footer = f"{ended} of {len(plan)} runs ended; left: {duration(_left(standings, jobs))}"
    table = aligned([COLUMNS, *rows], left=(0, 2))
    return "\n".join([*table, "", f"{footer} with --jobs {jobs}"])


def forecast(plan: list[PlannedRun], jobs: int) -> str | None:
    """How long the sweep will take, once a run has done its first steps, and what shortens it."""
    standings = _standings(plan)
    begun = [one for one in standings if one.run and one.done >= FIRST_STEPS and one.speed]
    seconds = _left(standings, jobs) if begun else None
    if seconds is None:
        return None
    text = f"measured: {begun[0].speed:.2f} s a step, so about {duration(seconds)} for what is left"
    if seconds > LONG:
        text += (
            "; shorter with fewer --recipes or --seeds, or `-- --trainer.max_steps N` in a new"
            " --out. Ctrl-C saves, and the same command goes on"
        )
    return text


def _standings(plan: list[PlannedRun]) -> list[_Standing]:
    runs = [read_run(p.folder) if has_record(p.folder) else None for p in plan]
    known = [(p, s) for p, run in zip(plan, runs, strict=True) if run and (s := _speed(run))]
    longest = max((int(run.info["max_steps"]) for run in runs if run), default=0)
    found = []
    for planned, run in zip(plan, runs, strict=True):
        # not begun: as the other seeds, or else as any
        alike = [s for p, s in known if p == planned] or [
            s for p, s in known if p.variant == planned.variant
        ]
        speeds = alike or [s for _, s in known]
        found.append(
            _Standing(
                *(planned, run, _state(planned, run), _steps(run) if run else 0),
                int(run.info["max_steps"]) if run else longest,
                median(speeds) if speeds else None,
            )
        )
    return found


def _left(standings: list[_Standing], jobs: int) -> float | None:
    """Seconds until the last run has ended."""
    known = [one.left for one in standings if one.left is not None]
    return sum(known) / jobs if len(known) == len(standings) else None


def _state(planned: PlannedRun, run: Run | None) -> str:
    if holder(planned.folder) is not None:
        return "running"
    if run is None:
        return "waiting"
    return "stopped" if run.status == "running" else run.status


def _steps(run: Run) -> int:
    return int(run.metrics["step"][-1]) if len(run.metrics["step"]) else 0


def _speed(run: Run) -> float | None:
    speed = run.tokens_per_second
    data = run.info["data"]
    return data["global_batch_size"] * data["seq_len"] / speed if speed else None


def duration(seconds: float | None) -> str:
    """h:mm:ss."""
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
