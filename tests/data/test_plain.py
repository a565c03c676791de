"""Plain data is what a type says, or one line says where it is not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from data.plain import as_type, read_as, read_json, sealed


class Shape(TypedDict):
    count: int
    name: NotRequired[str | None]


@dataclass(frozen=True)
class Row:
    mean: float
    parts: tuple[Shape, ...] = ()
    kind: Literal["a", "b"] = "a"


GOOD: list[tuple[Any, Any, Any]] = [
    (float, 1, 1.0),
    (float | None, None, None),
    (list[int], [1, 2], [1, 2]),
    (int | list[str], ["a"], ["a"]),
    (Shape, {"count": 1, "more": []}, {"count": 1, "more": []}),
    (Row, {"mean": 1, "parts": [{"count": 2}]}, Row(1.0, ({"count": 2},))),
]
BAD: list[tuple[Any, Any, str]] = [
    (int, True, "it is true, expected int"),
    (int, 1.0, "it is 1.0, expected int"),
    (float, 10**400, "expected float"),
    (list[int], [1, "a"], 'it[1] is "a", expected int'),
    (list[int], {}, "it is {}, expected list[int]"),
    (dict[str, list[int]], {"a": [None]}, "it: a[0] is null, expected int"),
    (Shape, {}, "it lacks count"),
    (Shape, {"count": 1, "name": 2}, "it: name is 2, expected str"),
    (Row, {"mean": "x"}, 'it: mean is "x", expected float'),
    (Row, {"mean": 1.0, "more": 1}, "it has more, expected mean, parts, kind"),
    (Row, {"mean": 1.0, "kind": "c"}, 'it: kind is "c", expected'),
    (str | None, 5, "it is 5, expected str"),
    (int | str, [], "it is [], expected int | str"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), GOOD)
def test_what_fits_is_taken(kind: Any, value: Any, expected: Any) -> None:
    assert as_type(kind, value, "it") == expected


@pytest.mark.parametrize(("kind", "value", "message"), BAD)
def test_what_does_not_is_named(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        as_type(kind, value, "it")
    assert message in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1, "a": 2}', b"[" + b"9" * 5000 + b"]"],
    ids=["empty", "half", "not text", "deep", "a key twice", "5,000 digits"],
)
def test_what_is_no_json_is_one_line_with_its_file(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as raised:
        read_json(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_a_seal_tells_of_every_change(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    text = json.dumps(sealed({"mean": 0.125, "parts": [{"count": 3}]}))
    path.write_text(text)
    assert read_as(Row, path) == Row(0.125, ({"count": 3},))
    for at in range(len(text)):
        changed = chr(ord(text[at]) ^ 1)
        path.write_text(text[:at] + changed + text[at + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            read_as(Row, path)
    path.write_text(json.dumps({"mean": 0.5}))  # an older file has none
    assert read_as(Row, path) == Row(0.5)
