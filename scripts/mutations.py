"""Changes of a valid file for scripts/fuzz.py, each drawn from a generator with a seed."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Change = Callable[[bytes, random.Random], bytes]
BYTES: tuple[bytes, ...] = (
    b"\0",
    b"\xff",
    b"\n",
    b",",
    b'"',
    b"{",
    b"}",
    b"nan",
    b"NaN",
    b"-",
    b"1e999",
    b"9" * 400,
)
BYTES += (b"\xed\xa0\x80", b"\t", b"&a ", b"*a", b"!!python/object:os.system", b"[" * 5000)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 0.5, -1e308, "", "x", "../x", "\0", "9" * 300, [], {}, [[]]),
    *({"a": 1}, [1, "a"], [None] * 3),
)


def mutated(raw: bytes, choice: random.Random) -> bytes:
    """One to three changes."""
    for _ in range(choice.choice((1, 1, 1, 2, 3))):
        change = choice.choice(CHANGES)
        raw = change(raw, choice)
    return raw


def _place(raw: bytes, choice: random.Random) -> tuple[int, int]:
    """A stretch, mostly a short one, often near the beginning, where headers are."""
    most = min(len(raw), 600) if choice.random() < 0.4 else len(raw)
    at = choice.randrange(most + 1)
    return at, min(len(raw), at + int(10 ** choice.uniform(0, 2.5)))


def _flip(raw: bytes, choice: random.Random) -> bytes:
    if not raw:
        return raw
    at = min(_place(raw, choice)[0], len(raw) - 1)
    return raw[:at] + bytes([raw[at] ^ 1 << choice.randrange(8)]) + raw[at + 1 :]


def _cut(raw: bytes, choice: random.Random) -> bytes:
    return raw[: _place(raw, choice)[0]]


def _without(raw: bytes, choice: random.Random) -> bytes:
    at, end = _place(raw, choice)
    return raw[:at] + raw[end:]


def _twice(raw: bytes, choice: random.Random) -> bytes:
    at, end = _place(raw, choice)
    return raw[:end] + raw[at:]


def _insert(raw: bytes, choice: random.Random) -> bytes:
    at, _ = _place(raw, choice)
    return raw[:at] + choice.choice((*BYTES, choice.randbytes(8))) + raw[at:]


def _overwrite(raw: bytes, choice: random.Random) -> bytes:
    """A number of eight bytes, as lengths and offsets are."""
    at, _ = _place(raw, choice)
    value = choice.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, choice.getrandbits(16)))
    return raw[:at] + struct.pack("<Q", value) + raw[at + 8 :]


def _digit(raw: bytes, choice: random.Random) -> bytes:
    places = [i for i, byte in enumerate(raw[:200_000]) if chr(byte).isdigit()]
    if not places:
        return _flip(raw, choice)
    at = choice.choice(places)
    return raw[:at] + str(choice.randrange(10)).encode() + raw[at + 1 :]


def _lines(raw: bytes, choice: random.Random) -> bytes:
    lines = raw.split(b"\n")
    a, b = choice.randrange(len(lines)), choice.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _json(raw: bytes, choice: random.Random) -> bytes:
    """Another value at a place of a JSON tree, or a key less, or renamed."""
    try:
        whole = json.loads(raw)
    except ValueError:
        return _digit(raw, choice)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in [*node] if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if not isinstance(whole, dict | list) or choice.random() < 0.02:
        return json.dumps(choice.choice(VALUES)).encode()
    walk(whole)
    if not places:
        return raw
    node, key = choice.choice(places)
    match choice.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        case _:
            node[key] = choice.choice(VALUES)
    return json.dumps(whole).encode()


CHANGES: tuple[Change, ...] = (
    _flip,
    _cut,
    _without,
    _twice,
    _insert,
    _overwrite,
    _digit,
    _digit,
    _lines,
)
CHANGES += (_json, _json, _json)
