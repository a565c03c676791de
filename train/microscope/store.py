"""What the microscope measured, as Parquet: a file a table and step, so that adding is atomic."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


class DiagnosticsStore:
    """`<table>-<step>.parquet` in `folder`; `read` gives a whole table, as any reader of Parquet
    datasets does. A killed run leaves whole files alone, and a resumed one drops later steps'.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, table: str, step: int, rows: Rows) -> None:
        """Durable when it returns, or not there."""
        import pyarrow.parquet

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{table}-{step:08d}.parquet"
        staging = path.with_suffix(".tmp")
        with staging.open("wb") as file:
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist([{"step": step} | row for row in rows]), file
            )
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)

    def read(self, table: str) -> list[dict[str, Any]]:
        """All rows, by ascending step."""
        import pyarrow.parquet

        paths = sorted(self.folder.glob(f"{table}-*.parquet"))
        return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]

    def cut_back(self, step: int) -> None:
        """Drop what was measured after `step`, and what a kill left half written."""
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        for path in self.folder.glob("*-*.parquet"):
            if int(path.stem.rpartition("-")[2]) > step:
                path.unlink()
