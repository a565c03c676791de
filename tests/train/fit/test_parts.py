"""Optimizers, schedules, callbacks by class_path: recorded, paired, resumed bitwise."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train.model.optimizer import optimizer_of
from train.model.schedule import WSD
from train.model.step import Optimization, lr_factor
from train.runs.declaration import Group
from train.runs.run import read_run

Fit = Callable[..., int]
MODULE = '''
from lightning.pytorch import Callback
from train.model.schedule import Schedule

class Counting(Callback):
    """How many steps a run has done, over all its starts."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append(trainer.global_step)
        module.log_dict({}, logger=True)
        for logger in trainer.loggers:
            logger.log_metrics({"seen": len(self.seen)}, step=trainer.global_step)

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state) -> None:
        self.seen = state["seen"]

class Staircase(Schedule):
    def factor(self, step: int, steps: int, min_ratio: float) -> float:
        return 1.0 if step < steps // 2 else min_ratio
'''
OPTIMIZER, SCHEDULE = "--model.optimization.optimizer", "--model.optimization.schedule"
PARTS = {
    "SGD, WSD": (
        *(OPTIMIZER, "torch.optim.SGD", f"{OPTIMIZER}.momentum", "0.9"),
        *(SCHEDULE, "train.model.schedule.WSD", f"{SCHEDULE}.decay", "0.5"),
    ),
    "Muon, constant": (OPTIMIZER, "Muon", SCHEDULE, "Constant"),
    "own": (
        *("--plugins", "own_parts", SCHEDULE, "own_parts.Staircase"),
        *("--trainer.callbacks", "[{class_path: own_parts.Counting}, LearningRateMonitor]"),
    ),
}
FACTORS = {  # of the updates 1 to 6, two of them warm-up
    "SGD, WSD": [0.5, 1, 1, 1, 0.55, 0.1],
    "Muon, constant": [0.5, 1, 1, 1, 1, 1],
    "own": [0.5, 1, 1, 1, 0.1, 0.1],
}


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return tmp_path / "modules" / "own_parts.py"


def end(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", PARTS)
def test_a_run_with_others_parts_resumes_bitwise(
    name: str,
    fit: Fit,
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
) -> None:
    flags = (*PARTS[name], "--checkpoint_every", "2")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert fit(whole, "mxint8", *flags) == 0
    on_micro_batch(3, end)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(parted, "mxint8", *flags)
    on_micro_batch(99, end)
    assert fit(parted, "mxint8", *flags) == 0
    assert_same_run(whole, parted)
    with (parted / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0.01 * factor for factor in FACTORS[name]], rel=1e-12)
    assert read_run(whole).identity.hash == read_run(parted).identity.hash


def test_parts_are_part_of_the_pairing(fit: Fit, tmp_path: Path, own_parts: Path) -> None:
    import hashlib

    short = ("--trainer.max_steps", "1")
    runs = []
    for index, flags in enumerate([(), *PARTS.values()]):
        assert fit(tmp_path / str(index), "bf16", *short, *flags) == 0
        runs.append(read_run(tmp_path / str(index)).identity)
    assert len({identity.pair_hash for identity in runs}) == 4
    found = {d.field for d in runs[0].differences(runs[3], Group.SHARED)}
    assert found == {"model.optimization.schedule.class_path", "parts", "trainer.callbacks"}
    record = json.loads((tmp_path / "3" / "run.json").read_text())
    digest = hashlib.sha256(own_parts.read_bytes()).hexdigest()
    assert record["parts"] == {"own_parts.Staircase": digest, "own_parts.Counting": digest}


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    """Against torch's own two, each over its parameters."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](self.embed(x))).square().sum() * 0.5 + 1.0

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

    torch.manual_seed(0)
    ours, theirs = Outer(), Outer()
    theirs.load_state_dict(ours.state_dict())
    settings = Optimization(lr=0.01, optimizer=lambda parameters: torch.optim.Muon(parameters))
    optimizer = optimizer_of(ours, settings)
    plain = theirs.model
    muon = torch.optim.Muon([plain.layers[0].weight], lr=0.01, weight_decay=0.1)
    adam = torch.optim.AdamW(
        [
            {"params": [plain.embed.weight], "weight_decay": 0.1},
            {"params": [plain.layers[0].bias, *plain.layers[1].parameters()], "weight_decay": 0.0},
        ],
        lr=0.01, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    x = torch.arange(7)
    for step in range(4):
        if step == 2:  # as a resume does
            state = optimizer.state_dict()
            optimizer = optimizer_of(ours, settings)
            optimizer.load_state_dict(state)
        for model, steps in ((ours.model, [optimizer]), (plain, [muon, adam])):
            model.zero_grad()
            model(x).backward()
            for each in steps:
                each.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wsd_ends_at_its_last_rate() -> None:
    settings = Optimization(warmup_steps=10, min_lr_ratio=0.0, schedule=WSD(0.25))
    factors = [lr_factor(settings, step, 110) for step in range(110)]
    assert factors[9:85] == [1.0] * 76 and factors[-1] == 0.0
    assert factors[85:] == pytest.approx([1 - n / 25 for n in range(1, 26)])


REFUSED = {
    (OPTIMIZER, "torch.optim.SGD", f"{OPTIMIZER}.lr", "3"): "SGD's lr=3.0 is not used",
    (OPTIMIZER, "torch.optim.Rprop"): "Rprop has none, set 0",
    (OPTIMIZER, "torch.optim.SGD", f"{OPTIMIZER}.momentum", "-1"): "momentum",
    (OPTIMIZER, "torch.optim.SGD", f"{OPTIMIZER}.mom", "1"): "mom",
    (OPTIMIZER, "foo"): "model.optimization.optimizer=foo: expected a class",
    (OPTIMIZER, "SGD", "--model.optimization.betas", "[0.8, 0.9]"): "betas is AdamW's",
    (SCHEDULE, "foo"): "model.optimization.schedule=foo: expected a class",
    (SCHEDULE, "WSD", f"{SCHEDULE}.decay", "0"): "decay=0.0",
    (SCHEDULE, "Constant", "--model.optimization.min_lr_ratio", "0.2"): "has no effect",
    (SCHEDULE, "own_parts.Staircase"): "--plugins own_parts",
    ("-c", "model: {optimization: {optimizer: {class_path: bad.SGD}}}"): "--plugins bad",
    ("--plugins", "nowhere", SCHEDULE, "nowhere.S"): "nowhere",
    ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "x"): "no epochs",
    ("-c", "trainer: {callbacks: [{class_path: ModelCheckpoint}]}"): "checkpoint_every",
    ("-c", "trainer: {callbacks: [{class_path: BatchSizeFinder}]}"): "data.global_batch_size",
    ("-c", "trainer: {callbacks: [{class_path: LearningRateFinder}]}"): "model.optimization.lr",
    ("-c", "trainer: {callbacks: [{class_path: LearningRateMonitor, init_args: {x: 1}}]}"): "'x'",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_parts_that_do_not_fit(
    flags: tuple[str, ...], fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "mxint8", *flags) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert line.startswith("lowbit: error: ") and REFUSED[flags] in line
    assert len(line) <= 200, line
    assert not (tmp_path / "run").exists()
