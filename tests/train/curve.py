"""One curve on 1 and 2 ranks, for test_curve.py: the same steps taken from the same weights.

python curve.py FOLDER TOKENS STEPS      writes FOLDER/results.json

A reduction in another order differs in the seventh digit, and a quantizer turns that into another
code now and then; so the runs are compared step by step, each from the reference's weights, beside
runs that go their own way.
"""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from recorder import Recorder
from safetensors import safe_open
from torch import Tensor
from two_ranks import free_port, start_rank

CONFIG = """
model:
  llama: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64}
  optimization: {lr: 1.0e-3, warmup_steps: 10}
data: {seq_len: 32, global_batch_size: 8}
trainer: {precision: 32-true, accelerator: cpu, limit_val_batches: 0}
checkpoint_every: 1000
collective_timeout: 60
"""
RECIPES = Path(__file__).parents[2] / "configs" / "recipe"
TIED = "mxfp8"  # the recipe whose runs have one matrix as embedding and as head


class Curves:
    def __init__(self, folder: Path, tokens: Path, steps: int) -> None:
        self.folder, self.tokens, self.steps = folder, tokens, steps
        (folder / "config.yaml").write_text(CONFIG)

    def run(
        self,
        name: str,
        recipe: str,
        strategy: str = "auto",
        accumulate: int = 1,
        start: str | None = None,
        perturb: float = 0.0,
    ) -> None:
        """All ranks of a run; each leaves its record in FOLDER/<name>-<rank>.pt."""
        ranks, port = 1 if strategy == "auto" else 2, free_port()
        argv = ["-c", str(self.folder / "config.yaml"), "-c", str(RECIPES / f"{recipe}.yaml")]
        argv += ["--data.path", str(self.tokens), "--run_dir", str(self.folder / name)]
        argv += ["--trainer.strategy", strategy, "--trainer.max_steps", str(self.steps)]
        argv += ["--trainer.accumulate_grad_batches", str(accumulate)]
        argv += ["--model.llama.tie_word_embeddings", str(recipe == TIED).lower()]
        path = self.folder / f"{start}-0.pt" if start else None

        def prepare(rank: Any) -> Any:
            recorder = Recorder(path, perturb, self.steps - 1)
            recorder.install()
            return lambda: torch.save(recorder.kept(), self.folder / f"{name}-{rank}.pt")

        logs = [self.folder / f"{name}-{rank}.log" for rank in range(ranks)]
        pids = [start_rank(log, r, ranks, port, prepare, argv) for r, log in enumerate(logs)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise RuntimeError(f"{name}: {codes}\n{logs[0].read_text()[-3000:]}")

    def loss(self, name: str) -> Tensor:
        """Of every step, as rank 0 logged it."""
        with (self.folder / name / "metrics.csv").open(newline="") as file:
            rows = [float(row["train/loss"]) for row in csv.DictReader(file)]
        assert len(rows) == self.steps
        return torch.tensor(rows, dtype=torch.float64)

    def deviation(self, name: str, reference: str) -> list[float]:
        """Relative, of the loss, by step."""
        expected = self.loss(reference)
        deviation: list[float] = ((self.loss(name) - expected) / expected).abs().tolist()
        return deviation

    def exported(self, name: str) -> dict[str, list[int]]:
        """The shapes of the tensors in the run's model.safetensors."""
        with safe_open(self.folder / name / "hf" / "model.safetensors", "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}

    def compare(self, name: str, reference: str) -> dict[str, Any]:
        """The largest relative deviations of all steps, and the share of codes that differ."""
        records = [torch.load(path) for path in sorted(self.folder.glob(f"{name}-?.pt"))]
        expected = torch.load(self.folder / f"{reference}-0.pt")
        windows = [
            sorted(window for part in parts for window in part)
            for parts in zip(*(record["windows"] for record in records), strict=True)
        ]
        gradients = [
            relative_l2(a, b)
            for a, b in zip(records[0]["gradients"], expected["gradients"], strict=True)
        ]
        codes = {first: kept for record in records for first, kept in record["codes"].items()}
        throughput = json.loads((self.folder / name / "run.json").read_text())["throughput"]
        return {
            "ranks": len(records),
            "same windows": windows == [sorted(w) for w in expected["windows"]],
            "same start": all(
                torch.equal(v, expected["initial"][n]) for n, v in records[0]["initial"].items()
            ),
            "same export": self.exported(name) == self.exported(reference),
            "exports a head": "lm_head.weight" in self.exported(name),
            "loss": max(self.deviation(name, reference)),
            "gradient": max(gradients),
            "seconds": {n: s for n, s in throughput.items() if "communication" in n},
            "codes": differing([codes[first] for first in sorted(codes)], expected["codes"][0]),
        }


def relative_l2(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all parameters' gradients as one vector."""
    error = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    norm = sum(float(value.double().square().sum()) for value in b.values())
    return float((error / norm) ** 0.5)


def differing(micro_batches: list[list[Tensor]], whole_batch: list[Tensor]) -> float | None:
    """The share of quantized values that are others than in the whole batch."""
    parts = [torch.cat(operand) for operand in zip(*micro_batches, strict=True)]
    different = sum(int((a != b).sum()) for a, b in zip(parts, whole_batch, strict=True))
    total = sum(part.numel() for part in parts)
    return different / total if total else None


def results(curves: Curves) -> dict[str, Any]:
    """By recipe: each follower against the reference, and runs that go their own way."""
    found: dict[str, Any] = {}
    followers = {"1x4": ("auto", 4), "ddp 2x2": ("ddp", 2), "fsdp2 2x1": ("fsdp2", 1)}
    # a name says ranks x micro-batches of a rank
    for recipe in ("bf16", "mxint8", "mxfp8"):
        curves.run(recipe, recipe)
        found[recipe] = {}
        for name, (strategy, accumulate) in followers.items():
            if strategy == "auto" and recipe != "bf16":
                continue
            run = f"{recipe}-{name.replace(' ', '-')}"
            curves.run(run, recipe, strategy, accumulate, start=recipe)
            found[recipe][name] = curves.compare(run, recipe)
    for recipe in ("bf16", "mxint8"):
        curves.run(f"{recipe}-free", recipe, "ddp", 2)
        found[recipe]["free"] = curves.deviation(f"{recipe}-free", recipe)
    for seed in (1, 2):
        curves.run(f"replica{seed}", "mxint8", perturb=1e-7 * (-1) ** seed)
    found["mxint8"]["replicas"] = [curves.deviation(f"replica{s}", "mxint8") for s in (1, 2)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = results(Curves(folder, Path(sys.argv[2]), int(sys.argv[3])))
    (folder / "results.json").write_text(json.dumps(found))
