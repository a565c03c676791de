"""Files of plain data, read strictly: text, JSON, and what a type says; or one line with the file.

Whoever reads what another program, a full disk or a person left says here what it must be:

    casts = read_as(dict[str, CastGap], path)

Anything else is a ValueError that names the file, the place in it and what was expected there.
"""

import dataclasses
import hashlib
import json
import pickle
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

MOST_BYTES = 2**30
SEAL = "checksum"  # of the rest of a JSON object; older files have none


def read_text(path: Path) -> str:
    """UTF-8; OSError where there is no such file."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not UTF-8 text: {what}") from None


def read_json(path: Path) -> Any:
    """One JSON value without a key twice; NaN, which older lowbits wrote, is null."""
    try:
        return json.loads(
            read_text(path), object_pairs_hook=_object, parse_constant=lambda name: None
        )
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:  # a key twice, a whole number of 5,000 digits, not text
        raise ValueError(_named(path, str(error))) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return found


def _named(path: Path, message: str) -> str:
    return message if message.startswith(str(path)) else f"{path}: {message}"


def read_as(kind: Any, path: Path) -> Any:
    """The file's JSON as a `kind`, an object's seal checked and taken off."""
    return as_type(kind, unsealed(read_json(path), path), str(path))


# --- seals --------------------------------------------------------------------------------------


def sealed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """With the checksum of the rest: a changed number is no other number."""
    return {**plain, SEAL: _checksum(plain)}


def unsealed(plain: Any, path: Path) -> Any:
    """Without it; ValueError where it is not that of the rest."""
    if not isinstance(plain, dict) or SEAL not in plain:
        return plain
    rest = {key: value for key, value in plain.items() if key != SEAL}
    if plain[SEAL] != _checksum(rest):
        raise ValueError(f"{path} is not what was written: its checksum is not that of the rest")
    return rest


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


# --- types --------------------------------------------------------------------------------------


def as_type(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a plain type, a Literal, a union, a list, tuple or dict of such, a
    TypedDict (further keys stay) or a dataclass (further keys are errors).

    Numbers are finite, and a whole one will do for a float. `where` begins the message.

    >>> as_type(dict[str, float | None], {"a": 1, "b": None}, "it")
    {'a': 1.0, 'b': None}
    """
    origin, of = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(of, kind, value, where)
    if origin is Literal:
        return value if value in of and type(value) is str else _wrong(kind, value, where)
    if origin in (list, tuple) and isinstance(value, list):
        items = [as_type(of[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict and isinstance(value, dict):
        return {key: as_type(of[1], x, f"{where}: {key}") for key, x in value.items()}
    if isinstance(value, dict) and is_typeddict(kind):
        return value | _fields(kind, value, where, kind.__required_keys__)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return _instance(kind, value, where)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    return value if type(value) is kind else _wrong(kind, value, where)


def _one_of(kinds: tuple[Any, ...], whole: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    failures = []
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return as_type(kind, value, where)
        except ValueError as error:
            failures.append(error)
    raise failures[0] if len(failures) == 1 else ValueError(_message(whole, value, where))


def _fields(kind: Any, value: dict[str, Any], where: str, required: Any) -> dict[str, Any]:
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    return {k: as_type(hints[k], value[k], f"{where}: {k}") for k in value if k in hints}


def _instance(kind: Any, value: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{where} has {', '.join(unknown)[:80]}, expected {', '.join(fields)}")
    none = dataclasses.MISSING
    required = {n for n, f in fields.items() if f.default is none and f.default_factory is none}
    return kind(**_fields(kind, value, where, required))


def _wrong(kind: Any, value: Any, where: str) -> Any:
    raise ValueError(_message(kind, value, where))


def _message(kind: Any, value: Any, where: str) -> str:
    shown = json.dumps(value, default=str)
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    name = re.sub(r"\b[\w.]+\.(?=\w)", "", name).replace("NoneType", "null")
    return f"{where} is {shown if len(shown) <= 60 else shown[:56] + ' ...'}, expected {name}"


# --- what libraries read ------------------------------------------------------------------------

MOST_WORDS = 130  # characters of a library's own


@contextmanager
def explained(what: str) -> Iterator[None]:
    """`what`: the library's reason, as a ValueError, whatever kind it raises: a parser of a format
    that is broken in ways that its authors did not think of raises what its language does.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line that says something, and the kind of error where the text alone does not."""
    if isinstance(error, pickle.UnpicklingError):  # torch's is a page on what not to do
        return "it is a pickle that is broken, or holds more than plain data"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:MOST_WORDS]
    kind = "" if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{text}".removesuffix(": ")
