"""Lightning has no logger for trackio: this is one."""

import importlib.util
import secrets
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """A run of trackio, by its name in a project; the same name goes on with it.

    Without a name a new run has one of its own, which begins with `title`.
    """

    def __init__(
        self,
        project: str = "lowbit",
        name: str | None = None,
        title: str = "run",
        **kwargs: Any,
    ) -> None:
        """`kwargs`: of trackio.init."""
        super().__init__()
        if importlib.util.find_spec("trackio") is None:
            raise ModuleNotFoundError("trackio is not installed: pip install trackio")
        name = name or f"{title}-{secrets.token_hex(3)}"
        self._arguments = {"project": project, "name": name, "embed": False} | kwargs
        self._run: Any = None
        self._config: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The project."""
        return str(self._arguments["project"])

    @property
    def version(self) -> str:
        """The run's name."""
        return str(self._arguments["name"])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """trackio's run; it begins with the first use."""
        if self._run is None:
            import trackio

            self._run = trackio.init(**self._arguments, config=self._config, resume="allow")
        return self._run

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """trackio takes them when the run begins."""
        self._config |= vars(params) if isinstance(params, Namespace) else params
        if self._run is not None:  # it sends them with its next row
            self._run.config = {**self._run.config, **self._config}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """All rows are written, and the run is closed."""
        if self._run is not None:
            self._run.finish()
            self._run = None
