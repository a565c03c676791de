"""What predictions lose: losses and divergences of every arm, on the same windows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import QuantLinear, QuantRecipe
from train.model.head import compared
from train.runs.metrics import perplexity
from train.stats.intervals import interval
from train.subjects.text import Text

TOP = 25  # logits of the baseline in the study's KL
CHUNK = 256  # tokens whose probabilities are held in float64 at a time


@dataclass(frozen=True)
class Score:
    """Means over the tokens of each window, nats."""

    loss: list[float]
    kl: list[float]
    kl_top: list[float]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    recipes: Mapping[str, QuantRecipe],
    text: Text,
    others: Mapping[str, nn.Module] | None = None,
    *,
    autocast: bool = False,
) -> dict[str, Score]:
    """Every recipe of `model`, then all `others`, on every window; the first recipe is the
    baseline of the divergences. ValueError for another of another vocabulary.

    Logits are FP32, as in a sweep's cast gap; `autocast`: all before them as in a BF16 run.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    arms: dict[str, tuple[nn.Module, QuantRecipe | None]] = {
        n: (model, r) for n, r in recipes.items()
    }
    arms |= {name: (other.to(device).eval(), None) for name, other in (others or {}).items()}
    scores = {name: Score([], [], []) for name in arms}
    for inputs, labels in zip(text.inputs.to(device), text.labels.to(device), strict=True):
        reference = None
        for name, (arm, recipe) in arms.items():
            if recipe is not None:
                for layer in layers:
                    layer.set_recipe(recipe)
            with compared(arm, device, autocast=autocast):
                logits = arm(input_ids=inputs[None], use_cache=False).logits[0]
            if reference is None:
                reference = logits.double().log_softmax(-1)
            if logits.shape != reference.shape:
                sizes = f"{logits.shape[-1]} tokens, the baseline {reference.shape[-1]}"
                raise ValueError(f"{name} has a vocabulary of {sizes}")
            found = divergences(reference, logits, labels)
            scores[name].loss.append(found[0])
            scores[name].kl.append(found[1])
            scores[name].kl_top.append(found[2])
    return scores


def divergences(reference: Tensor, logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Loss of `logits`, KL(reference || logits), and that over the reference's top tokens: means
    over the tokens. `reference` are log-probabilities in float64.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(0, len(labels), CHUNK):
        here = slice(start, start + CHUNK)
        p, q, right = reference[here], logits[here].double().log_softmax(-1), labels[here]
        best = p.topk(min(TOP, p.shape[-1]), dim=-1).indices
        sums[0] += F.nll_loss(q, right, reduction="sum")
        sums[1] += _kl(p, q)
        sums[2] += _kl(p.gather(-1, best).log_softmax(-1), q.gather(-1, best).log_softmax(-1))
    loss, kl, kl_top = (sums / len(labels)).tolist()
    return loss, kl, kl_top


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="sum", log_target=True)


def summary(name: str, score: Score, baseline: Score) -> dict[str, Any]:
    """One row of the table."""
    gaps = [ours - theirs for ours, theirs in zip(score.loss, baseline.loss, strict=True)]
    mean = float(np.mean(score.kl_top))
    return {
        "format": name, "perplexity": perplexity(float(np.mean(score.loss))),
        "loss": float(np.mean(score.loss)), "loss gap": float(np.mean(gaps)), "± gap": _half(gaps),
        "KL": float(np.mean(score.kl)), "± KL": _half(score.kl),
        f"top-{TOP} KL": mean, f"± top-{TOP}": _half(score.kl_top), "study x1e6": mean / TOP * 1e6,
    }  # fmt: skip


def paired(score: Score, first: Score) -> dict[str, float]:
    """KL less that of the first MODEL, window by window."""
    gaps = [ours - theirs for ours, theirs in zip(score.kl, first.kl, strict=True)]
    return {"KL - first": float(np.mean(gaps)), "± paired": _half(gaps)}


def _half(values: Sequence[float]) -> float:
    """Half the width of the interval of the mean; NaN for a single window."""
    if len(values) < 2:
        return math.nan
    found = interval(np.array(values))
    return float(found.high - found.mean)
