"""Batches: shifted labels, each token predicted once, the same on resuming, complete over ranks."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from data.module import Batch, TokenDataModule, document_positions
from data.shards import Manifest

SEQ_LEN = 64


def module(folder: Path, **arguments: object) -> TokenDataModule:
    defaults: dict[str, object] = {"path": str(folder), "seq_len": SEQ_LEN, "global_batch_size": 8}
    return TokenDataModule(**defaults | arguments)  # type: ignore[arg-type]  # keys are arguments


class Recorder(LightningModule):
    """Records what it is given and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[tuple[int, Batch]] = []
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained.append((self.global_step, batch))
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


# What Lightning 2.6 itself warns of; pytest turns any warning into an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def fit(
    data: TokenDataModule, steps: int, resume: Path | None = None, **options: object
) -> tuple[Recorder, Trainer]:
    recorder = Recorder()
    trainer = Trainer(max_steps=steps, enable_checkpointing=False, **QUIET | options)  # type: ignore[arg-type]  # keys are arguments
    trainer.fit(recorder, datamodule=data, ckpt_path=resume)
    return recorder, trainer


def windows(recorder: Recorder) -> list[tuple[int, int, list[int]]]:
    return [
        (step, int(batch["first_sample"]), batch["window"].tolist())
        for step, batch in recorder.trained
    ]


def test_labels_are_the_next_tokens_and_each_is_predicted_once(
    folder: Path, manifest: Manifest
) -> None:
    whole = np.concatenate([np.load(folder / shard.file) for shard in manifest.train.shards])
    num_windows = (len(whole) - 1) // SEQ_LEN
    recorder, _ = fit(module(folder, global_batch_size=1), steps=num_windows)
    batches = [batch for _, batch in recorder.trained]
    order = torch.cat([batch["window"] for batch in batches])
    assert sorted(order.tolist()) == list(range(num_windows))
    inputs = torch.cat([batch["input_ids"] for batch in batches])[order.argsort()]
    labels = torch.cat([batch["labels"] for batch in batches])[order.argsort()]
    assert inputs.flatten().tolist() == whole[: num_windows * SEQ_LEN].tolist()
    assert labels.flatten().tolist() == whole[1 : num_windows * SEQ_LEN + 1].tolist()
    assert inputs.dtype == labels.dtype == order.dtype == torch.int64


def test_accumulation_and_workers_do_not_change_the_global_batches(folder: Path) -> None:
    plain = windows(fit(module(folder), steps=20)[0])
    assert [(step, first, len(ids)) for step, first, ids in plain[:2]] == [(0, 0, 8), (1, 0, 8)]
    accumulated = windows(fit(module(folder), 20, accumulate_grad_batches=4)[0])
    assert [first for _, first, _ in accumulated[:4]] == [0, 2, 4, 6]
    assert [i for _, _, ids in accumulated for i in ids] == [i for _, _, ids in plain for i in ids]
    assert windows(fit(module(folder, num_workers=2), 20)[0]) == plain


def test_a_resumed_run_goes_on_with_the_next_step(folder: Path, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2}
    whole = windows(fit(module(folder), 20, **options)[0])
    first, trainer = fit(module(folder), 13, **options)
    trainer.save_checkpoint(tmp_path / "at13.ckpt")
    second, _ = fit(module(folder), 20, resume=tmp_path / "at13.ckpt", **options)
    assert windows(first) + windows(second) == whole


def attached(data: TokenDataModule, rank: int, world_size: int) -> TokenDataModule:
    """As on one rank of several."""
    device = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=1,
        global_step=0,
        strategy=device,
    )
    data.setup()
    return data


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("val_windows", [None, 1, 5, 8, 9])
def test_validation_takes_each_window_once_over_the_ranks(
    folder: Path, manifest: Manifest, world_size: int, val_windows: int | None
) -> None:
    ranks = [
        list(attached(module(folder, val_windows=val_windows), rank, world_size).val_dataloader())
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # else the others would wait for ever
    in_turn = [batch for together in zip(*ranks, strict=True) for batch in together]
    ids = torch.cat([batch["window"] for batch in in_turn])
    labels = torch.cat([batch["labels"] for batch in in_turn])
    wanted = val_windows or (manifest.val.tokens - 1) // SEQ_LEN
    total = (manifest.val.tokens - 1) // SEQ_LEN
    chosen = ids[ids >= 0].tolist()
    assert chosen == [
        math.floor(Fraction(total, wanted) * (i + Fraction(1, 2))) for i in range(wanted)
    ]
    assert (labels[ids < 0] == -100).all() and (labels[ids >= 0] >= 0).all()
    whole = np.concatenate([np.load(folder / shard.file) for shard in manifest.val.shards])
    expected = [whole[i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1].tolist() for i in chosen]
    assert labels[ids >= 0].tolist() == expected


def test_validation_runs_in_the_trainer(folder: Path, manifest: Manifest) -> None:
    total = (manifest.val.tokens - 1) // SEQ_LEN
    chosen = [(2 * i + 1) * total // 10 for i in range(5)]
    recorder = Recorder()
    Trainer(**QUIET).validate(recorder, datamodule=module(folder, val_windows=5), verbose=False)  # type: ignore[arg-type]  # keys are arguments
    assert [batch["window"].tolist() for batch in recorder.validated] == [[*chosen, -1, -1, -1]]
    recorder = Recorder()
    first = module(folder, val_windows=5, val_choice="first")
    Trainer(**QUIET).validate(recorder, datamodule=first, verbose=False)  # type: ignore[arg-type]
    assert recorder.validated[0]["window"].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


def test_documents_of_windows_are_those_of_the_tokens_before_them(folder: Path) -> None:
    data = attached(module(folder), 0, 1)
    windows, eos = data._val, data.manifest.eos_id
    whole = windows.shards.read(0, len(windows.shards)).tolist()
    ids = np.arange(len(windows))
    expected = [whole[: i * SEQ_LEN].count(eos) for i in ids]
    assert windows.documents(ids, eos).tolist() == expected and expected[-1] > 0


def test_positions_start_again_after_the_end_of_a_document() -> None:
    inputs = torch.tensor(
        [[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 6, 7, 8, 9, 5, 0], [5, 5, 5, 5, 5, 5, 5, 5]]
    )
    assert document_positions(inputs, eos_id=0).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_document_masking_is_in_the_batch_only_when_asked_for(folder: Path) -> None:
    [(_, plain)] = fit(module(folder), 1)[0].trained
    [(_, masked)] = fit(module(folder, document_masking=True), 1)[0].trained
    assert masked.keys() - plain.keys() == {"position_ids"}
    eos = module(folder).manifest.eos_id
    assert (masked["position_ids"][:, 1:][masked["input_ids"][:, :-1] == eos] == 0).all()


def test_the_module_says_what_the_data_are(folder: Path, manifest: Manifest) -> None:
    data = module(folder)
    assert (data.fingerprint, data.vocab_size) == (manifest.fingerprint, 257)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len=0, expected at least 1"),
        ({"global_batch_size": 0}, "global_batch_size=0, expected at least 1"),
        ({"seq_len": 10**6}, "0 training windows of seq_len=1000000: too few for one batch"),
        ({"global_batch_size": 10**4}, "too few for one batch of global_batch_size=10000"),
        ({"val_windows": 10**4}, "expected at least 10000"),
        ({"val_windows": 0}, "val_windows=0, expected at least 1"),
    ],
)
def test_what_cannot_be_read_is_said_before_the_first_step(
    folder: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(folder, **arguments), 1)


def test_a_batch_that_accumulation_does_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="not a multiple of world_size=1 x accumulate_grad_batches=3"
    ):
        fit(module(folder), 1, accumulate_grad_batches=3)


@pytest.mark.parametrize("damage", ["bit", "size", "missing"])
def test_damaged_data_stop_before_the_first_step(folder: Path, damage: str) -> None:
    path = folder / "train-00001.npy"
    content = path.read_bytes()
    match damage:
        case "bit":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "size":
            path.write_bytes(content[:-2])
        case "missing":
            path.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.npy"):
        fit(module(folder), 1)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_data_without_a_validation_split_train(
    tmp_path: Path, request_of: Callable[..., object]
) -> None:
    from data.prepare import prepare

    prepare(tmp_path / "out", request_of(val_fraction=0))  # type: ignore[arg-type]  # keys are arguments
    assert len(fit(module(tmp_path / "out"), 2)[0].trained) == 2
