"""The run's own two loggers take a row at once; what others get is in others.py."""

from collections.abc import Iterable, Mapping

from train.loggers.event_log import EventLog
from train.loggers.metrics_csv import MetricsCsv


def log_row(loggers: Iterable[object], row: Mapping[str, float], step: int) -> None:
    """At full precision, at the number of finished optimizer steps."""
    for logger in loggers:
        if isinstance(logger, MetricsCsv | EventLog):
            logger.log_metrics(dict(row), step=step)
