"""Rows of JSON and parquet files: one text field each."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data.files import MAX_LINE, Report, digest, extension, read_lines

_BATCH_ROWS = 100


def json_rows(path: Path, skip: int, report: Report, field: str) -> Iterator[str]:
    """The texts of a file of JSON lines, or of one array, but for the first `skip`."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    written = (line for line in read_lines(path, report) if not line.isspace())
    first = next(written, "")
    lines = chain([first] if first else [], written)
    if extension(path) == ".json" and first.lstrip().startswith("["):
        rows = iter(_array(path, lines))
        yield from (_text(path, row, field) for n, row in enumerate(rows) if n >= skip)
        return
    for number, line in enumerate(lines):
        if number >= skip:
            yield _text(path, _parsed(path, line, f"row {number + 1}"), field)


def _array(path: Path, lines: Iterator[str]) -> list[Any]:
    parts, size = [], 0
    for line in lines:
        parts.append(line)
        if (size := size + len(line)) > MAX_LINE:
            raise ValueError(
                f"{path} is one JSON array of more than {MAX_LINE:,} characters: "
                "expected one row a line (.jsonl)"
            )
    rows = _parsed(path, "".join(parts), "the array")
    assert isinstance(rows, list)
    return rows


def _parsed(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} cannot be read: JSON parse error in {what}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: {what} is nested too deep") from error


def _text(path: Path, row: Any, field: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{path} cannot be read: a row is {type(row).__name__}, expected fields")
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{path} cannot be read: no field {field!r} in rows of {list(row)[:20]}"
            )
        value = value[part]
    return checked_text(path, value, field)


def checked_text(name: Path | str, value: Any, field: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(
            f"{name} cannot be read: field {field!r} of a row is {kind}, expected text"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} cannot be read: a row holds half a surrogate pair") from error
    return value


def parquet_rows(path: Path, skip: int, report: Report, field: str) -> Iterator[str]:
    """The texts of a parquet file but for the first `skip`; the file is hashed after it, since
    of its columns only one is read.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file, before = ParquetFile(path), 0
        names = file.schema_arrow.names
        if field.split(".")[0] not in names and field not in names:
            raise ValueError(f"{path} cannot be read: no field {field!r} in rows of {names}")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before + rows > skip:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field])
                values = (value for batch in batches for value in column(batch, field))
                for number, value in enumerate(values, before):
                    if number >= skip:
                        yield checked_text(path, value, field)
            before += rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    report(path, digest(path))


def column(rows: Any, field: str) -> list[Any]:
    """The values of a column of an Arrow batch or table, of a nested one by its path."""
    if field in rows.schema.names:
        values: list[Any] = rows.column(field).to_pylist()
        return values
    top, *path = field.split(".")
    if top not in rows.schema.names:
        raise ValueError(f"no field {field!r} in rows of {rows.schema.names}")
    values = rows.column(top).to_pylist()
    for part in path:
        if any(not isinstance(value, dict) or part not in value for value in values):
            raise ValueError(f"no field {field!r} in rows of {rows.schema.names}")
        values = [value[part] for value in values]
    return values
