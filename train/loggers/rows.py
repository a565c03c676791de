"""The run's own two loggers take a row at once; what others get is in others.py."""

from collections.abc import Iterable, Mapping

from train.loggers.event_log import EventLog
from train.loggers.metrics_csv import MetricsCsv
from train.runs.metrics import COLUMNS


def log_row(loggers: Iterable[object], row: Mapping[str, float], step: int) -> None:
    """At full precision, at the number of finished optimizer steps."""
    if unknown := row.keys() - {*COLUMNS}:
        raise ValueError(f"metrics.csv has no column for {sorted(unknown)}")
    for logger in loggers:
        if isinstance(logger, MetricsCsv | EventLog):
            logger.log_metrics(dict(row), step=step)
