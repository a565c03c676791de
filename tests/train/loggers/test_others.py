"""Other people's loggers hold the rows of metrics.csv, each once, whatever happened to the run."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

Fit = Callable[..., int]
EVERY = ("--checkpoint_every", "2")
STUB = '''
import json
from pathlib import Path
from lightning.pytorch.loggers import Logger

class Recording(Logger):
    """Appends what it gets to a file, under no identity."""

    name = version = "recording"
    refuses = 0  # a step

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    def _add(self, **what) -> None:
        with self.path.open("a") as file:
            print(json.dumps(what), file=file)

    def log_metrics(self, metrics, step=None) -> None:
        if step == Recording.refuses:
            raise ConnectionError("no route to host")
        self._add(step=step, row=metrics)

    def log_hyperparams(self, params) -> None:
        self._add(config=params)
'''


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stub of a logger writes; importable as `recording.Recording`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "recording.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return tmp_path / "rows.jsonl"


def rows_of(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def recorded(path: Path) -> tuple[list[dict[str, float]], list[Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{"step": line["step"], **line["row"]} for line in lines if "row" in line]
    return rows, [line["config"] for line in lines if "config" in line]


def csv_rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def end(*args: Any) -> None:
    raise KeyboardInterrupt


def stopped_fit(fit: Fit, run: Path, *flags: str) -> None:
    """What ends a run without a save: rows after the last checkpoint are made again."""
    try:
        assert fit(run, "mxint8", *EVERY, *flags) != 0
    except (KeyboardInterrupt, SystemExit):
        pass


@pytest.mark.parametrize("stops", [(3,), (1, 4)], ids=str)
def test_each_row_once_after_kills(
    stops: tuple[int, ...],
    fit: Fit,
    stub: Path,
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
) -> None:
    run = tmp_path / "run"
    flags = ("--log", "csv", "--plugins", "recording", "--trainer.logger", "recording.Recording")
    flags = (*flags, "--trainer.logger.path", str(stub))
    for stop in stops:
        on_micro_batch(stop, end)
        stopped_fit(fit, run, *flags)
        on_micro_batch(99, end)
    assert fit(run, "mxint8", *EVERY, *flags) == 0
    rows, configs = recorded(stub)
    assert rows == rows_of(run)
    assert len(rows) == 6 and sum("val/loss" in row for row in rows) == 2
    newest = max((run / "csv").iterdir())
    assert csv_rows(newest / "metrics.csv") == rows
    assert (
        configs[0]["model"]["llama"]
        == yaml.safe_load((newest / "hparams.yaml").read_text())["model"]["llama"]
    )
    assert configs[0]["identity"] == json.loads((run / "run.json").read_text())["identity"]["hash"]


def test_a_run_that_goes_back_begins_anew(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, csv = tmp_path / "run", "lightning.pytorch.loggers.CSVLogger"
    flags = ("--trainer.logger", csv, "--trainer.logger.save_dir", str(tmp_path / "logs"))
    assert fit(run, "mxint8", *EVERY, *flags, "--keep_checkpoints", "9") == 0
    again = ("--resume", str(run / "checkpoints" / "step-00000002"), "--trainer.max_steps", "4")
    assert fit(run, "mxint8", *EVERY, *flags, *again) == 0
    assert "CSVLogger begins anew" in capsys.readouterr().out
    old, new = (tmp_path / "logs" / "lightning_logs" / f"version_{n}" for n in (0, 1))
    assert [row["step"] for row in csv_rows(old / "metrics.csv")] == [1, 2, 3, 4, 5, 6]
    assert csv_rows(new / "metrics.csv") == rows_of(run)


def test_a_logger_that_fails_ends_no_run_and_is_offered_its_rows_again(
    fit: Fit, stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import recording

    flags = ("--plugins", "recording", "--trainer.logger", "recording.Recording")
    flags = (*flags, "--trainer.logger.path", str(stub))
    recording.Recording.refuses = 3
    assert fit(tmp_path / "run", "mxint8", *EVERY, *flags) == 0
    assert capsys.readouterr().out.count("did not take the rows after step 2 (no route") == 1
    assert [row["step"] for row in recorded(stub)[0]] == [1, 2]
    recording.Recording.refuses = 0
    more = ("--trainer.max_steps", "8")
    assert fit(tmp_path / "run", "mxint8", *EVERY, *flags, *more) == 0
    assert recorded(stub)[0] == rows_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--log", "foo"), "log=foo: expected some of wandb, mlflow, csv, trackio"),
        (("--log", "csv,csv"), "each once"),
        (("--log", "csv,,x"), "expected some of"),
        (("--log", "wandb"), "wandb"),
        (("--log", "mlflow"), "mlflow"),
        (("--log", "trackio"), "trackio is not installed"),
        (("--plugins", "a-b"), "--plugins 'a-b'"),
        (("-c", "plugins: json"), "plugins is set by a file"),
        (("--trainer.callbacks", "foo"), "trainer.callbacks=foo"),
        (("--model.optimization", "3"), "model.optimization: expected a mapping"),
        (("--trainer.devices", "[a]"), "devices"),
        (("--trainer.logger", "true"), "trainer.logger=true: expected a class"),
        (("--trainer.logger", "false"), "trainer.logger=false: expected a class"),
        (("--trainer.logger", "WandbLogger"), "wandb"),
        (("--trainer.logger", "foo.Bar"), "foo.Bar"),
        (("--trainer.logger", "CSVLogger"), "save_dir"),
        (("--trainer.logger", "3"), "trainer.logger"),
        (("-c", "trainer: {logger: [CSVLogger]}"), "save_dir"),
        (("-c", "trainer: {logger: {class_path: json.JSONDecoder}}"), "json.JSONDecoder"),
        (("-c", "trainer: {logger: {class_path: CSVLogger, init_args: {save_di: x}}}"), "save_di"),
    ],
    ids=str,
)
def test_what_is_no_logger_is_one_line(
    flags: tuple[str, ...],
    expected: str,
    fit: Fit,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert fit(tmp_path / "run", "mxint8", *flags) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert line.startswith("lowbit: error: ") and expected in line
    assert len(line) <= 200, line
    assert sorted(tmp_path.iterdir()) == before


def test_ours_are_not_replaced() -> None:
    """Whoever looks for a CSVLogger among a trainer's finds the user's alone."""
    from train.loggers.metrics_csv import MetricsCsv

    assert not issubclass(MetricsCsv, CSVLogger)
