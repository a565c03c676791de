"""Distillation: towards the predictions of a frozen, unquantized teacher, in place of labels.

    loss = mean over tokens of KL(teacher || student) + cross_entropy x CE(labels, student)

Quantization-aware distillation is this with the model that the student started from. The teacher
computes in the run's own precision, sees the same tokens and positions, and is no part of the
module: neither optimized nor saved. What is logged as `train/loss` is this loss; `val/loss` is the
cross entropy of the labels, as everywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from data.module import IGNORED_LABEL
from train.model.initial import weights_hash
from train.model.step import label_losses, logits_of
from train.runs.exports import check_export


@dataclass(frozen=True)
class Distillation:
    """The teacher, and what counts beside it."""

    teacher: str
    """Folder or hub id of a causal language model of the same vocabulary, in safetensors."""
    cross_entropy: float = 0.0
    """Weight of the labels' cross entropy beside KL(teacher || student)."""


class Teacher:
    """Read when it is first asked for."""

    def __init__(self, asked: Distillation, vocab_size: int) -> None:
        if not 0 <= asked.cross_entropy < math.inf:  # by Distillation itself it would be lost among
            raise ValueError(  # what else jsonargparse's union might have been
                f"model.distill_from.cross_entropy={asked.cross_entropy}: expected 0 or more"
            )
        self.asked, self._vocab_size = asked, vocab_size
        self._on: torch.device | None = None

    @cached_property
    def config(self) -> Any:
        """Its configuration; ValueError for what cannot teach."""
        source = self.asked.teacher
        path = Path(source)
        if source.startswith((".", "/", "~")) and not path.is_dir():
            raise FileNotFoundError(f"model.distill_from.teacher={source}: no such folder")
        try:
            found = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:120]
            raise ValueError(f"model.distill_from.teacher={source}: {reason}") from None
        if getattr(found, "quantization_config", None):
            raise ValueError(f"model.distill_from.teacher={source} holds quantized weights")
        if found.vocab_size != self._vocab_size:
            raise ValueError(
                f"model.distill_from.teacher={source} has vocab_size={found.vocab_size}, "
                f"model.llama {self._vocab_size}"
            )
        return found

    @cached_property
    def model(self) -> nn.Module:
        """FP32 weights, in eval mode; ValueError for tensors missing, or too many."""
        check_export(Path(self.asked.teacher))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.asked.teacher, config=self.config, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        for kind in ("missing", "unexpected", "mismatched"):
            if keys := sorted(map(str, loaded[1][f"{kind}_keys"])):
                raise ValueError(
                    f"model.distill_from.teacher={self.asked.teacher}: {kind} tensors {keys[0]}"
                )
        model: nn.Module = loaded[0].eval().requires_grad_(False)
        return model

    def read(self) -> None:
        """Now: what is wrong with it is said before a start."""
        self.model.requires_grad_(False)

    @cached_property
    def hash(self) -> str:
        """Of its weights."""
        return weights_hash(self.model)

    @cached_property
    def num_parameters(self) -> int:
        """Without reading them."""
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            return sum(p.numel() for p in make(self.config).parameters())

    def loss(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Over the tokens of a micro-batch that count, nats."""
        logits, labels = logits_of(student, batch), batch["labels"]
        if self._on != logits.device:
            self.model.to(logits.device)
            self._on = logits.device
        with torch.no_grad():
            target = logits_of(self.model, batch).log_softmax(-1)
        counts = labels != IGNORED_LABEL
        own = logits.log_softmax(-1)
        divergence = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
        losses = divergence.masked_fill(~counts, 0.0)
        if self.asked.cross_entropy:
            losses = losses + self.asked.cross_entropy * label_losses(logits, labels)
        return losses.sum() / counts.sum()
