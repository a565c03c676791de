"""The cast gap: one set of trained weights, evaluated under several recipes.

It measures the forward error of a format without any training noise; what is left is the noise of
the validation sample, and the standard error over its windows is printed with it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from data.module import Windows
from data.shards import Manifest, TokenShards
from data.verify import verify
from lowbit import convert_linears
from train.configuration import read_policy
from train.module import token_losses
from train.runs import CastGap

MAX_WINDOWS = 1024
BATCH = 16


def cast_gaps(baseline: Path, runs: Sequence[Path]) -> dict[str, CastGap]:
    """Validation loss of `baseline`'s final weights under each run's recipe, minus under its own.

    Keys are the recipes' names. Evaluated in BF16 autocast on the validation split (at most
    MAX_WINDOWS windows), as `lowbit fit` validates; paired window by window.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    windows = _validation_windows(_config(baseline))
    losses = {}
    for run in runs:
        policy = read_policy(_config(run)["model"]["policy"])
        model = LlamaForCausalLM.from_pretrained(baseline / "hf", dtype=torch.float32)
        losses[policy.name] = _window_losses(convert_linears(model, policy), windows)
    own = losses[read_policy(_config(baseline)["model"]["policy"]).name]
    return {
        name: _gap(values - own, tokens=values.numel() * windows.seq_len)
        for name, values in losses.items()
    }


def _gap(differences: Tensor, tokens: int) -> CastGap:
    count = differences.numel()
    error = float(differences.std() / count**0.5) if count > 1 else float("nan")
    return CastGap(float(differences.mean()), error, count, tokens)


def _config(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return config


def _validation_windows(config: dict[str, Any]) -> Windows:
    path = Path(config["data"]["path"])
    manifest = Manifest.load(path)
    verify(path, manifest)
    mask_eos = manifest.eos_id if config["data"]["document_masking"] else None
    return Windows(TokenShards(path, manifest, "val"), config["data"]["seq_len"], mask_eos)


@torch.no_grad()
def _window_losses(model: Any, windows: Windows) -> Tensor:
    """Mean loss of each validation window, float64."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()
    ids = np.arange(min(len(windows), MAX_WINDOWS))
    means = []
    for chunk in np.array_split(ids, range(BATCH, len(ids), BATCH)):
        batch = {name: x.to(device) for name, x in windows.batch(chunk, 0).items()}
        with torch.autocast(device.type, torch.bfloat16):
            losses = token_losses(model, batch)
        means.append(losses.double().mean(1).cpu())
    return torch.cat(means)
