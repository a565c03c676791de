"""Whether what lies in a run folder belongs to the run: each artefact's identity against it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.shards import Manifest
from train.runs.declaration import SEGMENT, Group
from train.runs.identity import Difference, Identity, read_identity
from train.runs.record import read_config

WHAT_IT_IS = (Group.SHARED, Group.SEED, Group.RECIPE)
SEGMENTS = (*SEGMENT, "segments")  # what differs between one run's starts


def run_identity(folder: Path, record: Mapping[str, Any]) -> Identity:
    """Of the run in `folder`, whose run.json holds `record`."""
    return identity_of(folder, record, config_of(folder))


def identity_of(
    folder: Path, record: Mapping[str, Any], config: Mapping[str, Any] | None
) -> Identity:
    """The same with a config.yaml that is read already.

    ValueError if run.json's own keys or config.yaml contradict the identity in it. A run from
    before there were identities has the one that these two amount to.
    """
    whole = Identity.of(record, config)
    if not record.get("identity"):
        return _as_today(whole)
    stored = read_identity(record["identity"], folder / "run.json")
    for name, found, but in (
        ("run.json", Identity.of(record, None), ()),
        ("config.yaml", Identity.of({}, config), SEGMENTS),
    ):
        if wrong := [d for d in stored.differences(found, *WHAT_IT_IS, but=but) if d.is_of_both]:
            raise ValueError(f"{folder}/{name} is not this run's: {_first(wrong)}")
    return _of_labels(Identity({**whole.part(Group.FREE, Group.NAMED), **stored.fields}))


def _as_today(old: Identity) -> Identity:
    """Of a run from when `val_check_interval` counted micro-batches, and the first windows of the
    split were the validation's.
    """
    fields = dict(old.fields)
    if fields.get("data.val_windows") is not None:
        fields.setdefault("data.val_choice", "first")
    fields.setdefault("bf16_products", "native")  # as all did before there was a choice
    every, accumulate = (
        fields.get(f"trainer.{key}") for key in ("val_check_interval", "accumulate_grad_batches")
    )
    if isinstance(every, int) and isinstance(accumulate, int):
        fields["trainer.val_check_interval"] = every / accumulate
        if every % accumulate == 0:
            fields["trainer.val_check_interval"] = every // accumulate
    return _of_labels(Identity(fields))


def _of_labels(old: Identity) -> Identity:
    """Of a run from when there was no teacher to learn from."""
    silent = not {"model.distill_from", "teacher_weights"} & old.keys()
    if not silent or not any(field.startswith("model.") for field in old.fields):
        return old
    return Identity({**old.fields, "model.distill_from": None, "teacher_weights": None})


def config_of(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run folder, where there is one."""
    return read_config(folder) if (folder / "config.yaml").is_file() else None


def foreign(
    plain: Mapping[str, Any] | None,
    run: Identity,
    *,
    segments: bool = True,
    where: object = "artefact",
) -> list[Difference]:
    """In what an artefact's identity is not the run's; nothing where it has none.

    Without `segments` it may be of an earlier or a later part of the run.
    """
    if not plain:
        return []
    but = () if segments else SEGMENTS
    return read_identity(plain, where).differences(run, *WHAT_IT_IS, but=but)


def _first(differences: list[Difference]) -> str:
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return f"{differences[0]}{more}"


def refuse_foreign(
    where: object, plain: Mapping[str, Any] | None, run: Identity, *, segments: bool = True
) -> None:
    """ValueError, naming the first field and both values, unless the artefact is the run's."""
    if wrong := foreign(plain, run, segments=segments, where=where):
        raise ValueError(f"{where} is of another run: {_first(wrong)}")


def corpus_of(where: object, data: Mapping[str, Any], path: Path) -> Manifest:
    """The corpus that a run's record names in `data`; ValueError where `path` now holds another."""
    manifest, known = Manifest.load(path), data.get("fingerprint")
    if known is not None and manifest.fingerprint != known:
        raise ValueError(
            f"{path} holds another corpus than {where} was trained on: data.fingerprint "
            f"{known[:12]} -> {manifest.fingerprint[:12]}"
        )
    return manifest


def metrics_digest(folder: Path) -> str:
    """Of metrics.csv."""
    return file_digest(folder / "metrics.csv")


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
