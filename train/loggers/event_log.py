"""TensorBoard's events, where a disk that takes none is named, and may be gone on without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from data.durable import unwritten


class EventLog(TensorBoardLogger):
    """In the run folder itself. They are for looking: metrics.csv holds the numbers.

    `patient`: a failed write is said once, and the run goes on without events.
    """

    def __init__(self, folder: Path, purge_step: int, *, patient: bool = False) -> None:
        super().__init__(folder, name="", version="", purge_step=purge_step)
        self._folder, self._patient, self._is_lost = folder, patient, False

    @rank_zero_only
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: super(EventLog, self).log_metrics(*args, **kwargs))

    @rank_zero_only
    def flush(self) -> None:
        """To the file."""
        self._try(lambda: self.experiment.flush())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            self._try(lambda: super(EventLog, self).finalize(status))
        except OSError:
            if status != "failed":  # what failed is said already
                raise

    def _try(self, act: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            act()
        except OSError as error:
            failure = unwritten(self._folder / "events.out.tfevents.*", error)
            if not self._patient:
                raise failure from error
            self._is_lost = True
            print(f"lowbit: {failure}; going on without TensorBoard", flush=True)
