"""Which layer gets which recipe, and when."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lowbit.recipe import GEMMS, Phase, QuantRecipe


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
    phases: tuple[Phase, ...] = ()
    """By ascending start; before the first, all GEMMs are as their recipes say."""

    def __post_init__(self) -> None:
        before: tuple[float, set[str]] = (0.0, set(GEMMS))
        for phase in self.phases:
            if phase.start <= before[0]:
                raise ValueError(f"phases must start later and later: {phase} after {before[0]}")
            if not self._quantized(before[1]) ^ self._quantized(set(phase.gemms)):
                raise ValueError(f"{phase} has no effect: it leaves quantized what was before")
            before = phase.start, set(phase.gemms)
            for recipe in self._recipes():
                recipe.only(*phase.gemms)  # raises for what cannot be taken apart

    def phase_at(self, step: int, max_steps: int) -> Phase | None:
        """The phase of the update number `step`, counted from 0; None before the first."""
        if self.phases and max_steps < 1:
            raise ValueError(f"phases are fractions of max_steps, which is {max_steps}")
        begun = [phase for phase in self.phases if phase.first_step(max_steps) <= step]
        return begun[-1] if begun else None

    def resolve(
        self, model: nn.Module, phase: Phase | None = None
    ) -> dict[str, QuantRecipe | None]:
        """Every linear layer of `model` by name, in order; None leaves it alone.

        Raises ValueError for a pattern that matches no layer, a rule or recipe that decides none,
        and for more kept blocks than exist.
        """
        places = model.named_modules(remove_duplicate=False)  # each of a shared layer's
        names = [name for name, module in places if isinstance(module, nn.Linear)]
        for pattern in (*self.skip, *(rule.pattern for rule in self.rules)):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{pattern!r} matches no linear layer of {names}")
        kept = self._kept_blocks(model)
        skipped = [
            name
            for name in names
            if name.startswith(kept) or any(fnmatchcase(name, pattern) for pattern in self.skip)
        ]
        rules = {name: self._rule(name) for name in names if name not in skipped}
        self._check_decides(rules)
        recipes = {name: rule.recipe if rule else self.recipe for name, rule in rules.items()}
        if phase is not None:
            recipes = {name: recipe.only(*phase.gemms) for name, recipe in recipes.items()}
        return {name: recipes.get(name) for name in names}

    def _rule(self, name: str) -> LayerRule | None:
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def _check_decides(self, rules: dict[str, LayerRule | None]) -> None:
        decisive = list(rules.values())
        for rule in self.rules:
            if not any(rule is other for other in decisive):
                raise ValueError(f"{rule.pattern!r} decides no layer: others before it match them")
        if None not in decisive and self.recipe != QuantRecipe():
            raise ValueError("recipe decides no layer: skip, kept blocks and rules match them all")

    @property
    def redraws(self) -> bool:
        """Whether some layer's rotations get signs of each step."""
        return any(recipe.redraws for recipe in self._recipes())

    def _recipes(self) -> tuple[QuantRecipe, ...]:
        return (self.recipe, *(rule.recipe for rule in self.rules))

    def _quantized(self, gemms: set[str]) -> set[str]:
        """Of these GEMMs, those that a recipe quantizes."""
        return {g for g in gemms if any(recipe.quantizes(g) for recipe in self._recipes())}

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
