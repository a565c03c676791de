"""Whether a sweep that is called again is the one its folder holds, and which runs have ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.fit.configuration import resolved_config
from train.runs.belonging import SEGMENTS, WHAT_IT_IS, run_identity
from train.runs.declaration import Group
from train.runs.identity import Difference, Identity, flat
from train.runs.record import has_record, read_config, read_record, run_status
from train.sweep.request import PlannedRun

ENDED = ("finished", "diverged")  # a rerun changes neither


def ended_runs(plan: Sequence[PlannedRun], configs: tuple[Path, ...]) -> set[Path]:
    """The folders whose runs have ended as planned.

    ValueError, field by field, where a run that has begun is not the one that is planned for its
    folder. One that ended at fewer steps than planned goes on: `lowbit fit` begins a segment.
    """
    ended = set()
    for planned in plan:
        folder = planned.folder
        if not has_record(folder):
            continue
        if not _holds_configuration(folder):
            if run_status(folder) in ENDED:
                ended.add(folder)
            continue
        config = resolved_config(planned.command(configs)[1:])
        if changes := _changes(folder, config, WHAT_IT_IS):
            lines = "\n".join(f"  {change}" for change in changes)
            raise ValueError(
                f"the configuration differs from that of the run in {folder}:\n{lines}"
            )
        record, steps = read_record(folder), config["trainer"]["max_steps"]
        if record["max_steps"] > steps:
            raise ValueError(f"{folder} is planned with {record['max_steps']} steps, not {steps}")
        if run_status(folder) in ENDED and record["max_steps"] == steps:
            ended.add(folder)
    return ended


def check_folder(plan: Sequence[PlannedRun], configs: tuple[Path, ...]) -> None:
    """ValueError where runs of another sweep lie in the folder: they would be no pairs of ours."""
    out, folders = plan[0].out, {p.folder for p in plan}
    if (out / "branches.json").exists() or has_record(out):
        raise ValueError(f"{out} holds branches or a run: choose another --out for a sweep")
    others = [path.parent for path in sorted(out.glob("*/run.json")) if path.parent not in folders]
    others = [folder for folder in others if _holds_configuration(folder)]
    if not others:
        return
    config = resolved_config(plan[0].command(configs)[1:])
    ours = {key for p in plan for key in p.variant.changes}
    for folder in others:
        declared = {*ours, *(read_record(folder).get("declared") or ())}
        if changes := _changes(folder, config, (Group.SHARED,), declared):
            raise ValueError(
                f"{out} holds another sweep: {changes[0]} from {folder} to this one; choose another"
                " --out"
            )


def _holds_configuration(folder: Path) -> bool:
    """Whether there is anything to compare with: all that `lowbit fit` wrote."""
    return (folder / "config.yaml").is_file() and "model" in read_config(folder)


def _changes(
    folder: Path, config: Mapping[str, Any], groups: tuple[Group, ...], but: Any = ()
) -> list[Difference]:
    """From the run in `folder` to what the configuration says, before anything is built of it."""
    found = run_identity(folder, read_record(folder))
    changed = found.differences(Identity.of({}, config), *groups, but=(*SEGMENTS, *but))
    saved = flat(read_config(folder)["model"]["llama"], "model.llama")
    wanted = flat(config["model"]["llama"], "model.llama")
    changed += [
        Difference(key, saved.get(key), wanted.get(key))
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    return [change for change in changed if change.is_of_both]
