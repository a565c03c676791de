"""Which layer gets which recipe."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lowbit.recipe import QuantRecipe


@dataclass(frozen=True)
class LayerRule:
    """Layers whose name matches the glob `pattern` get `recipe`."""

    pattern: str
    recipe: QuantRecipe


@dataclass(frozen=True)
class LayerPolicy:
    """A recipe, and where it does not apply. The first that matches decides: skip, kept blocks,
    rules in order, then the recipe.
    """

    name: str
    recipe: QuantRecipe = field(default_factory=QuantRecipe)
    rules: tuple[LayerRule, ...] = ()
    skip: tuple[str, ...] = ("lm_head",)
    keep_first: int = 0
    """So many first blocks (of the longest ModuleList) stay as the baseline has them."""
    keep_last: int = 0

    def resolve(self, model: nn.Module) -> dict[str, QuantRecipe | None]:
        """Every linear layer of `model` by name, in order; None leaves it alone.

        Raises ValueError for a pattern that matches no layer and for more kept blocks than exist.
        """
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for pattern in (*self.skip, *(rule.pattern for rule in self.rules)):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{pattern!r} matches no linear layer of {names}")
        kept = self._kept_blocks(model)
        return {name: None if name.startswith(kept) else self._recipe(name) for name in names}

    def _recipe(self, name: str) -> QuantRecipe | None:
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        matching = (rule.recipe for rule in self.rules if fnmatchcase(name, rule.pattern))
        return next(matching, self.recipe)

    def _kept_blocks(self, model: nn.Module) -> tuple[str, ...]:
        """Name prefixes of the blocks that stay."""
        if not self.keep_first and not self.keep_last:
            return ()
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        if not lists:
            raise ValueError("keep_first / keep_last: the model has no ModuleList of blocks")
        name, blocks = max(lists.items(), key=lambda item: len(item[1]))
        if min(self.keep_first, self.keep_last) < 0 or self.keep_first + self.keep_last > len(
            blocks
        ):
            raise ValueError(
                f"keep_first={self.keep_first}, keep_last={self.keep_last} of {len(blocks)} blocks"
            )
        indices = [*range(self.keep_first), *range(len(blocks) - self.keep_last, len(blocks))]
        return tuple(f"{name}.{index}." for index in indices)
