"""Where a run goes on from, and whether it is still the same run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lowbit import bf16
from train.checkpoints.folder import (
    complete_checkpoints,
    find_resume_point,
    read_manifest,
    rename_aside,
    step_of,
    sweep_leftovers,
    verify_checkpoint,
)
from train.runs.belonging import SEGMENTS, WHAT_IT_IS, refuse_foreign, run_identity
from train.runs.identity import Identity, flat, read_identity, text
from train.runs.metrics import Mark
from train.runs.record import has_record, read_config, read_record, run_status


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


def rescale_progress(fit_loop: dict[str, Any], saved: dict[str, Any], accumulate: int) -> None:
    """Lightning counts micro-batches; with another number of them a step, count those."""
    before = saved["accumulate_grad_batches"]
    progress = fit_loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        unfinished = counts["ready"] - counts["completed"]
        for name, count in counts.items():
            counts[name] = count * accumulate // before
        counts["completed"] = counts["ready"] - unfinished


def resume_report(trainer: Trainer, module: Any, same_ranks: bool, ranks: int) -> str:
    """A line on what is as it was."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    samples = trainer.global_step * data.global_batch_size
    rng = "restored"
    if not same_ranks:
        rng = f"not restored, {ranks} ranks then and {trainer.world_size} now: dropout differs"
    return (
        f"resumed after step {trainer.global_step}: weights restored, optimizer and schedule "
        f"restored, random generators {rng}, data from sample {samples} on"
    )


_MOVES_DIGITS = ("threads", "torch", "versions", "machine", "kernels", "world_size")


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for what is not as it was when the checkpoint was saved; older ones tell less."""
    before, after = (flat({k: o[k] for k in _MOVES_DIGITS if k in o}) for o in (saved, now))
    changes = [
        f"{key} {text(before[key])} -> {text(after[key])}"
        for key in before.keys() & after.keys()
        if before[key] != after[key]
    ]
    what = ", ".join(sorted(changes))
    return [f"lowbit: not as when it was saved, last digits may differ: {what}"] if what else []


def set_later_aside(run_dir: Path, point: Path) -> None:
    """A run that goes back to an older checkpoint leaves the later ones behind, under a name."""
    for path in complete_checkpoints(run_dir / "checkpoints"):
        if step_of(path) > step_of(point):
            print(f"lowbit: {path} set aside as {rename_aside(path, 'superseded')}", flush=True)


def run_origin(trainer: Trainer, module: Any) -> dict[str, Any]:
    """What a resumed run must have in common with the one that saved, and where it stood."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "step": trainer.global_step,
        "recipe": recipe_of(module),
        "data_fingerprint": data.fingerprint,
        "world_size": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "bf16_products": bf16.products(module.device.type),
    }


def recipe_of(module: Any) -> dict[str, Any]:
    """The formats of every linear layer's operands, and from when on they change, as plain data."""
    layers = module.policy.resolve(module.model)
    tables = {name: recipe.table() if recipe else "kept" for name, recipe in layers.items()}
    phases = [[phase.start, *phase.gemms] for phase in module.policy.phases]
    return {"layers": tables, "phases": phases}


def check_origin(point: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError unless the checkpoint is of this recipe and this data."""
    for key in ("recipe", "data_fingerprint"):
        if saved.get(key) != now[key]:
            raise ValueError(
                f"{point} is not of this run: its {key} is\n  {_short(saved.get(key))}\nand this "
                f"run's is\n  {_short(now[key])}"
            )


def check_same_run(point: Path, run_dir: Path, now: Identity) -> None:
    """Raise ValueError with a field-by-field diff unless `now` is the run in `run_dir`.

    A checkpoint from before there were identities is known by the run folder that it lies in.
    """
    known = _identity_in(point)
    for folder in (run_dir, *([] if known else [point.parent.parent])):
        if (folder / "config.yaml").exists():
            record = read_record(folder) if has_record(folder) else {}
            _refuse_changes(folder, run_identity(folder, record), now)


def check_rows(point: Path, run_dir: Path) -> None:
    """Raise ValueError unless metrics.csv still holds the rows that the checkpoint was saved with.

    The training needs none of them: another run_dir may go on without them, and says so.
    """
    if point.parent.parent.resolve() != run_dir.resolve():
        return
    path, saved = run_dir / "metrics.csv", read_manifest(point)["origin"].get("metrics")
    data = path.read_bytes() if path.exists() else b""
    if saved:
        wrong = Mark(**saved).check(data)
    else:  # of an older lowbit
        wrong = "lacks its last rows" if _last_step(path) < step_of(point) else None
    if wrong:
        raise ValueError(
            f"{path} {wrong}: not the rows that {point} was saved with. Bring them back, or go on "
            f"without: --resume {point} in another run_dir"
        )


def check_weights(point: Path, run_dir: Path) -> None:
    """Raise ValueError for a checkpoint of a run from other initial weights than the folder's."""
    if has_record(run_dir) and (known := _identity_in(point)):
        run = run_identity(run_dir, read_record(run_dir))
        refuse_foreign(point, known.plain(), run, segments=False)


def check_same_origin(point: Path, now: Identity) -> None:
    """The same by the checkpoint's own identity, wherever it lies."""
    if known := _identity_in(point):
        _refuse_changes(point, known, now)


def _identity_in(point: Path) -> Identity | None:
    plain = read_manifest(point)["origin"].get("identity")
    return read_identity(plain, point) if plain else None


def _refuse_changes(where: Path, saved: Identity, now: Identity) -> None:
    if changes := saved.differences(now, *WHAT_IT_IS, but=SEGMENTS):
        lines = "\n".join(f"  {change}" for change in changes)
        raise ValueError(f"the configuration differs from that of the run in {where}:\n{lines}")


def adopt_older(point: Path, run_dir: Path, config: Any, data: Any) -> None:
    """What a run from before a field was recorded did, where today's default is another."""
    for folder in (run_dir, point.parent.parent):
        if (folder / "config.yaml").exists():
            if "val_choice" not in read_config(folder)["data"] and data.val_windows is not None:
                print(
                    f"lowbit: {folder} is of an older lowbit: data.val_choice is first", flush=True
                )
                data.val_choice = config["data"]["val_choice"] = "first"
            return


def bring_rows(point: Path, run_dir: Path, now: Identity) -> None:
    """A run that goes on from another folder's checkpoint takes the rows before it along."""
    own, source = run_dir / "metrics.csv", point.parent.parent
    if source.resolve() == run_dir.resolve() or _last_step(own) >= step_of(point):
        return
    theirs = source / "metrics.csv"
    if not has_record(source) or _last_step(theirs) < step_of(point):
        print(f"lowbit: {run_dir} lacks the rows up to step {step_of(point)}: none at {theirs}")
        return
    if run_identity(source, read_record(source)).differences(now, *WHAT_IT_IS, but=SEGMENTS):
        print(f"lowbit: {run_dir} lacks the rows up to step {step_of(point)}: {source} is another")
        return
    shutil.copyfile(theirs, own)
    print(f"lowbit: the rows up to step {step_of(point)} are those of {theirs}", flush=True)


def _last_step(path: Path) -> int:
    """0 without a row."""
    data = path.read_bytes() if path.exists() else b""
    last = data[data.find(b"\n") + 1 : data.rfind(b"\n") + 1].rstrip().rpartition(b"\n")[2]
    first = last.partition(b",")[0]
    return int(first) if first.isdigit() else 0


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 400 else f"{text[:400]} ..."
