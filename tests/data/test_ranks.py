"""Two processes: together they read what one reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from data.module import TokenDataModule

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []
    def training_step(self, batch, index):
        self.seen.append([self.global_step, int(batch["first_sample"]), batch["window"].tolist()])
        return self.weight.sum()
    def validation_step(self, batch, index):
        self.seen.append(["val", index, batch["window"].tolist()])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

folder, out, ranks, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
# The default would wrap a sampler: these batches must not depend on it.
trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    max_steps=12, val_check_interval=12, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    accumulate_grad_batches=2, use_distributed_sampler=True, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
recorder = Recorder()
data = TokenDataModule(folder, 64, 8, num_workers=workers, val_windows=5)
trainer.fit(recorder, datamodule=data)
with open(f"{out}.{trainer.global_rank}", "w") as file:
    json.dump(recorder.seen, file)
"""


def seen(folder: Path, out: Path, ranks: int, workers: int) -> list[list[object]]:
    command = [sys.executable, "-c", PROGRAM]
    if ranks > 1:
        (out.parent / "program.py").write_text(PROGRAM)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, str(out.parent / "program.py")]
    arguments = [str(folder), str(out), str(ranks), str(workers)]
    subprocess.run([*command, *arguments], check=True, timeout=120, capture_output=True)
    return [row for r in range(ranks) for row in json.loads(Path(f"{out}.{r}").read_text())]


def test_two_ranks_read_what_one_reads(folder: Path, tmp_path: Path) -> None:
    alone = seen(folder, tmp_path / "alone", ranks=1, workers=0)
    together = seen(folder, tmp_path / "together", ranks=2, workers=2)

    def samples(rows: list[list[object]]) -> list[tuple[int, int]]:
        found = []
        for step, first, ids in rows:
            if step != "val":
                found += [(step, first + offset, i) for offset, i in enumerate(ids)]  # type: ignore
        return sorted(found)

    def validated(rows: list[list[object]]) -> list[int]:
        return sorted(i for step, _, ids in rows if step == "val" for i in ids if i >= 0)  # type: ignore

    assert samples(together) == samples(alone) and len(samples(alone)) == 12 * 8
    assert validated(together) == validated(alone) and len(validated(alone)) % 5 == 0
