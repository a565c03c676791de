"""The loggers that a run names beside its own: which, with which settings, under which identity."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from train.loggers.trackio import TrackioLogger

#: class -> the argument that takes back what its `version` was: it then goes on with that run
IDENTITY = {
    "WandbLogger": "id",
    "MLFlowLogger": "run_id",
    "CometLogger": "experiment_key",
    "TensorBoardLogger": "version",
    "CSVLogger": "version",
    "TrackioLogger": "name",
}
ANEW = "CSVLogger"  # empties its file at each start
BUFFERS = ("WandbLogger", "TrackioLogger")  # what they hold back at a kill is lost
LEDGER = "loggers.json"

SHORT: dict[str, tuple[type[Logger], Callable[[Path], dict[str, Any]]]] = {
    "wandb": (
        WandbLogger,
        lambda run: {"project": "lowbit", "name": run.name, "save_dir": str(run)},
    ),
    "mlflow": (
        MLFlowLogger,
        lambda run: {
            "experiment_name": "lowbit",
            "run_name": run.name,
            # one store for the runs that stand side by side
            "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")
            or f"sqlite:///{run.resolve().parent}/mlflow.db",
        },
    ),
    "csv": (CSVLogger, lambda run: {"save_dir": str(run), "name": "csv"}),
    "trackio": (TrackioLogger, lambda run: {"project": "lowbit", "title": run.name}),
}


@dataclass
class Named:
    """A logger and what it has been given of this run."""

    logger: Logger
    settings: Mapping[str, Any]  #: plain, as configured
    handed: int = 0  #: rows up to this step were handed over, never to be again
    is_new: bool = True  #: is told the configuration
    closed: bool = False  #: it has let go of all rows that it was handed
    failing: bool = False

    @property
    def kind(self) -> str:
        """The class's name."""
        return type(self.logger).__name__

    def configured(self) -> dict[str, Any]:
        """What it is known by from one start to the next."""
        return {
            "class": self.kind,
            "settings": json.loads(json.dumps(self.settings, default=str)),
        }

    def entry(self) -> dict[str, Any]:
        """In the run folder's LEDGER; MLflow begins a run when it is asked for its version."""
        return {
            **self.configured(),
            "version": self.logger.version if self._takes_back else None,
            "handed": self.handed,
            "closed": self.closed,
        }

    @property
    def _takes_back(self) -> str | None:
        names = (IDENTITY.get(each.__name__) for each in type(self.logger).__mro__)
        return next(filter(None, names), None)

    def gone_on(self, entry: Mapping[str, Any], step: int) -> "Named":
        """The same that goes on where the entry's stood, for a run that goes on after `step`."""
        later = entry["handed"] > step
        if later or (self.kind in BUFFERS and not entry["closed"]):
            why = f"what it logged has rows after step {step}" if later else "it was killed"
            print(f"lowbit: {self.kind} begins anew, with all rows: {why}", flush=True)
            return self._begun_anew(step)
        if (takes := self._takes_back) is None:
            return Named(self.logger, self.settings, entry["handed"])
        again = type(self.logger)(**{**self.settings, takes: entry["version"]})
        if self.kind == ANEW:
            return Named(again, self.settings)
        # MLflow takes a parameter once
        return Named(again, self.settings, entry["handed"], is_new=self.kind != "MLFlowLogger")

    def _begun_anew(self, step: int) -> "Named":
        """Under another identity than the configured one."""
        takes = self._takes_back
        value = self.settings.get(takes) if takes else None
        if takes is None or not value:
            return self
        settings = dict(self.settings)
        settings[takes] = None if takes == "run_id" else f"{value}-after-{step}"
        return Named(type(self.logger)(**settings), self.settings)


def short_names(text: str | None) -> list[str]:
    """Of --log: names with commas between."""
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SHORT or names.count(name) > 1:
            raise ValueError(f"log={text[:60]}: expected some of {', '.join(SHORT)}, each once")
    return names


def named_loggers(
    configured: Iterable[tuple[Logger, Mapping[str, Any]]], short: str | None, folder: Path
) -> list[Named]:
    """Of trainer.logger, as built and as plain configuration, and of --log."""
    found = [
        Named(logger, plain.get("init_args", {}) | plain.get("dict_kwargs", {}))
        for logger, plain in configured
    ]
    for name in short_names(short):
        kind, arguments = SHORT[name]
        settings = arguments(folder)
        try:
            found.append(Named(kind(**settings), settings))
        except ImportError as error:
            raise ValueError(f"log={name}: {' '.join(str(error).split())[:120]}") from None
    return found


def gone_on_with(named: list[Named], folder: Path, step: int) -> list[Named]:
    """Each as the run folder's LEDGER has it, where the run goes on after `step`."""
    path = folder / LEDGER
    entries = json.loads(path.read_text()) if step and path.exists() else []
    found = []
    for each in named:
        own = each.configured()
        match = next((e for e in entries if {k: e.get(k) for k in own} == own), None)
        if match is not None:
            entries.remove(match)
            each = each.gone_on(match, step)
        found.append(each)
    return found


def write_ledger(named: Iterable[Named], folder: Path) -> None:
    """Whole or as it was, whoever is killed; a power cut is not worth a wait at every row."""
    temporary = folder / f"{LEDGER}.tmp"
    temporary.write_text(json.dumps([each.entry() for each in named], indent=1))
    temporary.replace(folder / LEDGER)
