"""The first micro-batch's products are counted, and a run that computes others does not go on."""

import torch
from torch import nn

from lowbit import Counting, LayerPolicy, Phase, enter_phase


class FirstProducts:
    """Counts once: of the first micro-batch."""

    def __init__(self) -> None:
        self._counting: Counting | None = None
        self._counted = False

    def count(self, model: nn.Module) -> None:
        """From here to `check`, unless it has been done."""
        if not self._counted:
            self._counting = Counting(model).__enter__()
        self._counted = True

    def check_empty(self, model: nn.Module, policy: LayerPolicy) -> None:
        """The same in every phase of `policy` for a model on the meta device, to be compiled later:
        what runs within a compiled graph cannot be counted. One with weights has been.
        """
        if not next(model.parameters()).is_meta:
            return
        ids = torch.zeros(1, 32, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, 32, 32, device="meta")  # transformers looks into others
        for phase in (*policy.phases, None):  # None is where a run begins
            enter_phase(model, policy, phase)
            self._counting = Counting(model).__enter__()
            model(input_ids=ids, attention_mask=mask).logits.sum().backward()
            model.zero_grad()
            self.check(model, policy, phase)

    def check(self, model: nn.Module, policy: LayerPolicy, phase: Phase | None) -> None:
        """ValueError where products differ from what `policy` says in `phase`."""
        if self._counting is None:
            return
        counting, self._counting = self._counting, None
        counting.__exit__()
        if differences := counting.differences(policy.resolve(model, phase)):
            shown = "; ".join(differences[:3])
            raise ValueError(f"{len(differences)} products differ from the recipe: {shown}")
