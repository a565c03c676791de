"""What a run is, as one value with stable bytes; who ran it, where and when is no part of it.

A run's identity is made from what was resolved: run.json's record and config.yaml flattened to
fields, whose groups `declaration.py` holds. Its hash stands in everything a run leaves behind, so
that whoever reads an artefact can tell whether it belongs to what it lies beside.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from train.runs.declaration import RESOLVED_ELSEWHERE, Group, any_covers, declared_key, group_of

IDENTITY_VERSION = 1
Fields = Mapping[str, Any]
MISSING = object()

# where a model came from or by which version it was written is not what it is
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype"}  # training is in FP32
#: fields, and where run.json holds them
_RECORDED = {
    "seed_everything": ("seed",),
    "data.fingerprint": ("data", "fingerprint"),
    "data.seed": ("data", "seed"),
    "data.seq_len": ("data", "seq_len"),
    "data.global_batch_size": ("data", "global_batch_size"),
    "data.val_windows": ("data", "val_windows"),
    "data.val_choice": ("data", "val_choice"),
    "initial_weights": ("initial_weights",),
    "teacher_weights": ("teacher_weights",),
    "trainer.max_steps": ("max_steps",),
    "trainer.precision": ("precision",),
    "bf16_products": ("bf16_products",),
    "model.policy.name": ("recipe",),
    "model.control": ("control",),
    "backend": ("backend",),
    "parts": ("parts",),
    "kernels": ("kernels",),
    "threads": ("threads",),
    "machine": ("machine",),
    "world_size": ("world_size",),
}

_PRECISIONS = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}


def canonical(value: Any) -> bytes:
    """The one spelling of a plain value; TypeError for any without stable bytes.

    >>> canonical({"b": (1, 1.0), "a": None})
    b'{"a":null,"b":[1,1.0]}'
    """
    _check_plain(value, "")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _check_plain(value: Any, place: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"identity: the key {key!r} of {place or 'it'} is not text")
            _check_plain(item, f"{place}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) is float and not math.isfinite(value):
        raise ValueError(f"identity: {place or 'it'} is {value}, expected a finite number")
    elif type(value) not in (type(None), bool, int, float, str):
        kind = type(value).__name__
        raise TypeError(f"identity: {place or 'it'} is a {kind}, which has no stable bytes")


def digest(value: Any) -> str:
    """SHA-256 of its canonical bytes."""
    return hashlib.sha256(canonical(value)).hexdigest()


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    items = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
    return {k: v for item in items for k, v in item.items()}


@dataclass(frozen=True)
class Difference:
    """A field in which two identities differ, and both values."""

    field: str
    first: Any  # MISSING where one holds no such field
    other: Any

    @property
    def is_of_both(self) -> bool:
        return self.first is not MISSING and self.other is not MISSING

    def __str__(self) -> str:
        return f"{self.field}: {text(self.first)} -> {text(self.other)}"


def text(value: Any) -> str:
    """Short enough for a line."""
    spelled = "nothing" if value is MISSING else json.dumps(value)
    return spelled if len(spelled) <= 64 else f"{spelled[:60]}..."


@dataclass(frozen=True)
class Identity:
    """The fields of a run, all of them declared."""

    fields: Fields

    @classmethod
    def of(cls, record: Mapping[str, Any], config: Mapping[str, Any] | None) -> "Identity":
        """From run.json's record and the resolved config.yaml.

        Both may be of a run that knew no identity: what they lack is no field, and what of its
        config.yaml is declared nowhere is none either.
        """
        known = {k: v for k, v in flat(config or {}).items() if declared_key(k) is not None}
        precision = known.get("trainer.precision")
        if "trainer.precision" in known:
            known["trainer.precision"] = _PRECISIONS.get(str(precision), precision)
        known |= _recorded(record)
        return cls(dict(sorted(known.items())))

    def part(self, *groups: Group) -> dict[str, Any]:
        """The fields of these groups."""
        return {k: v for k, v in self.fields.items() if group_of(k) in groups}

    @property
    def hash(self) -> str:
        """Of what the run is: all but what it may do differently and what is only named."""
        return digest(self.part(Group.SHARED, Group.SEED, Group.RECIPE))

    @property
    def pair_hash(self) -> str:
        """Of what the runs of a pair share."""
        return digest(self.part(Group.SHARED, Group.SEED))

    @property
    def recipe_hash(self) -> str:
        return digest(self.part(Group.RECIPE))

    def plain(self) -> dict[str, Any]:
        """What artefacts hold of it."""
        return {
            "version": IDENTITY_VERSION,
            "hash": self.hash,
            "pair": self.pair_hash,
            "fields": self.part(Group.SHARED, Group.SEED, Group.RECIPE),
        }

    def differences(
        self, other: "Identity", *groups: Group, but: Iterable[str] = ()
    ) -> list[Difference]:
        """Fields of `groups` that differ; what one of the two never recorded does not."""
        mine, theirs, but = self.part(*groups), other.part(*groups), tuple(but)
        silent = self.keys() ^ other.keys()
        return [
            Difference(field, mine.get(field, MISSING), theirs.get(field, MISSING))
            for field in sorted(mine.keys() | theirs.keys())
            if not same(mine.get(field), theirs.get(field))
            and declared_key(field) not in silent
            and not any_covers(but, field)
        ]

    def keys(self) -> set[str]:
        """Of the declaration, those that this identity holds fields of."""
        return {str(declared_key(field)) for field in self.fields}


def read_identity(plain: Mapping[str, Any], where: object) -> Identity:
    """From what an artefact holds; ValueError unless its hash is that of its fields."""
    found = plain.get("version")
    if found != IDENTITY_VERSION:
        raise ValueError(f"{where}: identity version {found}, this lowbit reads {IDENTITY_VERSION}")
    identity = Identity(dict(plain.get("fields") or {}))
    try:
        is_genuine = identity.hash == plain.get("hash")
    except (TypeError, ValueError) as error:  # a field that is declared nowhere, or of no bytes
        raise ValueError(f"{where}: {error}") from None
    if not is_genuine:
        raise ValueError(f"{where}: its identity's fields are not those that its hash was made of")
    return identity


def same(a: Any, b: Any) -> bool:
    """By their bytes: 1 is not 1.0 and not True, a tuple is its list."""
    return canonical(a) == canonical(b)


def _recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    fields = {}
    for field, path in _RECORDED.items():
        value: Any = record
        for part in path:
            value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
        if value is not MISSING and not (field == "initial_weights" and value is None):
            fields[field] = value
    model = {k: v for k, v in record.get("model", {}).items() if k not in NOT_THE_MODEL}
    fields |= flat(model, "architecture") if model else {}
    fields |= {f"versions.{name}": v for name, v in record.get("versions", {}).items()}
    if "recipe_table" in record:
        fields["recipe_table"] = digest(record["recipe_table"])
    return fields | _of_history(record)


#: of a start that may differ from the first one's
_OF_A_START = ("threads", "machine", "world_size")


def _of_history(record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the run's segments and starts."""
    fields: dict[str, Any] = {}
    if segments := record.get("segments"):
        keys = ("first_step", "max_steps", "val_check_interval", "accumulate_grad_batches")
        fields |= {f"trainer.{key}": segments[-1][key] for key in keys[1:]}
        rows = [[segment[key] for key in keys] for segment in segments]
        fields["segments"] = rows if len(rows) > 1 else []
    elif "accumulate_grad_batches" in record:
        fields["trainer.accumulate_grad_batches"] = record["accumulate_grad_batches"]
    starts = [_named(start) for start in record.get("starts", ())]
    for key in {key: None for start in starts for key in start}:
        values = list(dict.fromkeys(start.get(key) for start in starts))
        if len(values) > 1:
            fields[key] = values
    return fields


def _named(start: Mapping[str, Any]) -> dict[str, Any]:
    """What of a start is named when it differs."""
    versions = {f"versions.{name}": v for name, v in start.get("versions", {}).items()}
    return {key: start[key] for key in _OF_A_START} | versions


def is_replaced(field: str) -> bool:
    """Whether a key of config.yaml stands in an identity under another name."""
    return any_covers([RESOLVED_ELSEWHERE], field)
