"""The stretches of a run between changes of its horizon, and where they are recorded."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def segments_of(record: Record) -> list[dict[str, Any]]:
    """Of run.json or of a checkpoint's origin; one whole segment for a run that kept no history.

    Before there was a history, validation counted micro-batches, and nothing recorded how many.
    """
    if record.get("segments"):
        return list(record["segments"])
    if "max_steps" not in record:
        return []
    accumulate = record.get("accumulate_grad_batches", 1)
    first = {"first_step": 1, "max_steps": record["max_steps"], "phases": record.get("phases", [])}
    return [first | {"accumulate_grad_batches": accumulate, "val_check_interval": None}]


def continued(before: list[dict[str, Any]], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The segments up to `step`, and that of `now` if it is another than the last of them."""
    kept = [dict(segment) for segment in before if segment["first_step"] <= step]
    if not kept:
        return [{"first_step": 1} | now]
    if kept[-1]["val_check_interval"] is None:
        kept[-1]["val_check_interval"] = now["val_check_interval"]
    if {"first_step": kept[-1]["first_step"]} | now != kept[-1]:
        kept.append({"first_step": step + 1} | now)
    return kept


def initial_weights_of(record: Record) -> str | None:
    """The hash of the weights that the run started from, by run.json or a checkpoint's origin."""
    fields = (record.get("identity") or {}).get("fields", {})
    found: str | None = record.get("initial_weights") or fields.get("initial_weights")
    return found
