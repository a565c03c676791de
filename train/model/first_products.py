"""The first micro-batch's products are counted, and a run that computes others does not go on."""

from torch import nn

from lowbit import Counting, LayerPolicy, Phase


class FirstProducts:
    """Counts once: of the first micro-batch. Layers of compiled blocks cannot be counted."""

    def __init__(self) -> None:
        self._counting: Counting | None = None
        self._counted = False

    def count(self, model: nn.Module) -> None:
        """From here to `check`, unless it has been done."""
        if not self._counted:
            self._counting = Counting(model).__enter__()
        self._counted = True

    def check(self, model: nn.Module, policy: LayerPolicy, phase: Phase | None) -> None:
        """ValueError where products differ from what `policy` says in `phase`."""
        if self._counting is None:
            return
        counting, self._counting = self._counting, None
        counting.__exit__()
        if differences := counting.differences(policy.resolve(model, phase)):
            shown = "; ".join(differences[:3])
            raise ValueError(f"{len(differences)} products differ from the recipe: {shown}")
