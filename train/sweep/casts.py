"""The cast gap: one set of trained weights, evaluated under several recipes.

It measures the forward error of a format without any training noise; what is left is the noise of
the validation sample: windows of one document resemble each other, and the error allows for it.
Every window's gap and KL stay in the run folder, as cast_windows.json.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig

from data.module import IGNORED_LABEL, Windows, spread
from data.shards import Manifest, TokenShards
from data.verify import verify
from lowbit import Randomness, bf16, convert_linears
from train.checkpoints.folder import (
    complete_checkpoints,
    load_state,
    step_of,
    verify_checkpoint,
)
from train.config.policies import read_policy
from train.model.controls import perturb
from train.model.head import AUTOCAST, NAMES, compared
from train.model.initial import empty_model, random_model
from train.model.products import check_products
from train.model.step import apart
from train.runs.belonging import corpus_of, refuse_foreign, run_identity
from train.runs.casts import CastGap
from train.runs.record import read_record, read_whole_config
from train.stats.serial import window_mean

MAX_WINDOWS = 1024
BATCH = 16
FLOOR = "the baseline, its weights moved"
OF_ALL = ("along", "of", "under", "bf16_products")  # what is said once, not at each checkpoint


@bf16.everywhere()
def cast_gaps(baseline: Path, runs: Sequence[Path]) -> dict[str, CastGap]:
    """Validation loss of `baseline`'s final weights under each run's recipe, minus under its own.

    Keys are the recipes' names; controls, which have weights or noise of their own, are left out.
    Evaluated on the validation split (at most MAX_WINDOWS windows, spread over it) in the run's
    precision, with logits of FP32; paired window by window. `along`: at the kept checkpoints. None
    where there is no validation split, or no checkpoint of the last step.
    """
    config, record = read_whole_config(baseline), read_record(baseline)
    manifest = corpus_of(baseline, record["data"], Path(config["data"]["path"]))
    products = _products(baseline, record)
    windows = _validation_windows(config)
    if not len(windows):
        print(f"{baseline}: no cast gap, its data has no validation split", flush=True)
        return {}
    points = _own_checkpoints(baseline, record)
    if not points or step_of(points[-1]) != record["max_steps"]:
        print(f"{baseline}: no cast gap, the checkpoint of its last step is gone", flush=True)
        return {}
    llama = LlamaConfig(**record["model"])
    models = _Models(llama, config, [read_whole_config(run)["model"] for run in runs])
    per_step = config["data"]["global_batch_size"] * config["data"]["seq_len"]
    along: dict[str, list[Any]] = {}
    gaps: dict[str, CastGap] = {}
    for checkpoint in points:
        models.load(load_state(checkpoint)["state_dict"])
        gaps = models.gaps(windows, manifest.eos_id)  # of the last stay: the final weights
        for name, gap in gaps.items():
            place = {"step": step_of(checkpoint), "tokens_seen": step_of(checkpoint) * per_step}
            numbers = {k: v for k, v in asdict(gap).items() if k not in OF_ALL}
            along.setdefault(name, []).append(place | numbers)
    if gaps:
        text = json.dumps(models.windows, allow_nan=False) + "\n"
        (baseline / "cast_windows.json").write_text(text, encoding="utf-8")
    of = run_identity(baseline, record).plain()
    under = {
        one["recipe"]: run_identity(folder, one).recipe_hash
        for folder in (*runs, baseline)
        if not (one := read_record(folder)).get("control")
    }
    return {
        name: replace(
            gap, along=tuple(along[name]), of=of, under=under.get(name), bf16_products=products
        )
        for name, gap in gaps.items()
    }


def _own_checkpoints(run: Path, record: dict[str, Any]) -> list[Path]:
    """The run's, verified; ValueError for one of another run."""
    identity, points = run_identity(run, record), complete_checkpoints(run / "checkpoints")
    for point in points:
        origin = verify_checkpoint(point)["origin"]
        refuse_foreign(point, origin.get("identity"), identity, segments=False)
    return points


def _products(baseline: Path, record: dict[str, Any]) -> str:
    """How BF16 is multiplied here; ValueError unless the run did it so, where it matters."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    now = bf16.products(device.type)
    if AUTOCAST.get(str(record.get("precision")), True):
        check_products(baseline, record, now)
    return now


@bf16.everywhere()
def checkpoint_casts(
    checkpoint: Path, config: dict[str, Any], sections: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The same for a checkpoint's weights under the recipes of model `sections`: plain data.

    The windows, the documents they begin in, and every window's loss gap and KL, by recipe.
    """
    data, windows = config["data"], _validation_windows(config)
    llama = LlamaConfig(**read_record(checkpoint.parent.parent)["model"])
    models = _Models(llama, config, sections)
    models.load(load_state(checkpoint)["state_dict"])
    ids = spread(min(len(windows), MAX_WINDOWS), len(windows))
    found = models.differences(windows, ids)
    eos_id = Manifest.load(Path(data["path"])).eos_id
    documents = windows.documents(ids, eos_id).tolist()
    return {
        "windows": {"ids": ids.tolist(), "documents": documents},
        "tokens": len(ids) * windows.seq_len,
        "arithmetic": NAMES[config["trainer"]["precision"]],
        "values": {name: _rounded(values) for name, values in found.items()},
    }


def _rounded(values: Tensor) -> dict[str, list[float]]:
    columns = zip(("gap", "kl"), values.T.tolist(), strict=True)
    return {name: [float(f"{x:.6g}") for x in column] for name, column in columns}


class _Models:
    """One set of weights in several models, the baseline's first."""

    def __init__(
        self, llama: LlamaConfig, config: dict[str, Any], sections: Sequence[dict[str, Any]]
    ) -> None:
        seed = self._seed = config["seed_everything"]
        self._precision = config["trainer"]["precision"]
        self._weights = random_model(empty_model(llama).config, seed)
        self._own = read_policy(config["model"]["policy"]).name
        self._models: dict[str, Any] = {}
        self.windows: dict[str, Any] = {}  #: each one's gap and KL, of the last weights
        for section in [config["model"], *sections]:
            if section.get("control") is None:
                policy = read_policy(section["policy"])
                shared = {id(p): p for p in self._weights.parameters()}
                model = copy.deepcopy(self._weights, shared)
                convert_linears(model, policy, randomness=Randomness(seed))
                self._models[policy.name] = model
        self._device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._moved = copy.deepcopy(self._models[self._own])  # weights of its own
        for model in (*self._models.values(), self._moved):
            model.to(self._device).eval()

    def load(self, state: dict[str, Tensor]) -> None:
        prefix = "model."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for model in self._models.values():  # they share memory, unless a device parted them
            model.load_state_dict(own)
        self._moved.load_state_dict(own)
        perturb(self._moved, self._seed)

    @torch.no_grad()
    def differences(self, windows: Windows, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Each one's loss gap and KL window by window, [windows, 2], and those of FLOOR."""
        found: dict[str, list[Tensor]] = {name: [] for name in (*self._models, FLOOR)}
        for chunk in np.array_split(ids, range(BATCH, len(ids), BATCH)):
            batch = {name: x.to(self._device) for name, x in windows.batch(chunk, 0).items()}
            reference = self._logits(self._models[self._own], batch)
            for name, model in (*self._models.items(), (FLOOR, self._moved)):
                own = reference if name == self._own else self._logits(model, batch)
                found[name].append(_window_differences(reference, own, batch["labels"]))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def gaps(self, windows: Windows, eos_id: int) -> dict[str, CastGap]:
        ids = spread(min(len(windows), MAX_WINDOWS), len(windows))
        differences = self.differences(windows, ids)
        floor = float(differences.pop(FLOOR)[:, 1].mean())
        documents = windows.documents(ids, eos_id).tolist()
        tokens, arithmetic = len(ids) * windows.seq_len, NAMES[self._precision]
        self.windows = {"ids": ids.tolist(), "documents": documents} | {
            name: {"gap": values[:, 0].tolist(), "kl": values[:, 1].tolist()}
            for name, values in differences.items()
        }
        gaps = {name: _gap(values, documents, tokens) for name, values in differences.items()}
        return {n: replace(g, kl_floor=floor, arithmetic=arithmetic) for n, g in gaps.items()}

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with compared(model, self._device, autocast=AUTOCAST[self._precision]):
            return torch.cat([self._of(model, part) for part in apart(model, batch)])

    def _of(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits


def _window_differences(reference: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """Loss of `own` minus that of `reference`, and KL(reference || own): [windows, 2], float64.

    Means over each window's tokens; a window at a time, for the memory of the log-probabilities.
    """
    rows = []
    for p, q, right in zip(reference, own, labels, strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        losses = [F.nll_loss(x, right, ignore_index=IGNORED_LABEL).double() for x in (p, q)]
        kl = F.kl_div(q, p, reduction="sum", log_target=True).double() / len(right)
        rows.append(torch.stack([losses[1] - losses[0], kl]).cpu())
    return torch.stack(rows)


def _gap(windows: Tensor, documents: list[int], tokens: int) -> CastGap:
    """From rows of [loss difference, KL]."""
    gap, kl = (window_mean(column, documents) for column in windows.T.numpy())
    found, error = gap.estimate, kl.estimate.standard_error
    assert found.mean is not None
    return CastGap(
        found.mean, found.standard_error, len(windows), tokens, kl.estimate.mean, error,
        low=found.low, high=found.high, units=gap.by,
    )  # fmt: skip


def _validation_windows(config: dict[str, Any]) -> Windows:
    path = Path(config["data"]["path"])
    manifest = Manifest.load(path)
    verify(path, manifest)
    mask_eos = manifest.eos_id if config["data"]["document_masking"] else None
    return Windows(TokenShards(path, manifest, "val"), config["data"]["seq_len"], mask_eos)
