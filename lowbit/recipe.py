"""Which numerics each of a layer's six operands gets, and from which step on fewer do."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, NamedTuple

from lowbit.definition.rotation import Rotation
from lowbit.formats import BlockFormat, OuterScale, Rounding, block_format


class Role(NamedTuple):
    """What an operand is: of which GEMM, made of which tensor, in blocks along which axis."""

    gemm: str
    tensor: str
    axis: int  #: of the matrix [tokens, in], [tokens, out] or [out, in]
    stream: int  #: of its random numbers

    @property
    def name(self) -> str:
        """As recipes call it."""
        return f"{self.gemm}_{self.tensor}"

    @property
    def is_weight(self) -> bool:
        """Not a matrix of tokens."""
        return self.tensor == "weight"


_ROLES = (
    *(Role("fprop", "input", 1, 0), Role("fprop", "weight", 1, 1)),
    *(Role("dgrad", "grad_output", 1, 2), Role("dgrad", "weight", 0, 3)),
    *(Role("wgrad", "grad_output", 0, 4), Role("wgrad", "input", 0, 5)),
)
ROLES = {role.name: role for role in _ROLES}
OPERANDS = tuple(ROLES)
GEMMS = {
    gemm: tuple(role.name for role in _ROLES if role.gemm == gemm)
    for gemm in ("fprop", "dgrad", "wgrad")
}


@dataclass(frozen=True)
class QuantRecipe:
    """The format of each operand of the three GEMMs; None keeps it as the baseline has it.

        fprop   output      = Q(input)        Q(weight)ᵀ    blocks along in_features
        dgrad   grad_input  = Q(grad_output)  Q(weight)     blocks along out_features
        wgrad   grad_weight = Q(grad_output)ᵀ Q(input)      blocks along tokens

    Raises ValueError for a setting without effect.
    """

    fprop_input: BlockFormat | None = None
    fprop_weight: BlockFormat | None = None
    dgrad_grad_output: BlockFormat | None = None
    dgrad_weight: BlockFormat | None = None
    wgrad_grad_output: BlockFormat | None = None
    wgrad_input: BlockFormat | None = None
    reuse_fprop_weight: bool = False
    """dgrad takes fprop's copy of the weight (blocks along in_features), not one of its own."""
    fprop_rotation: Rotation | None = None
    dgrad_rotation: Rotation | None = None
    wgrad_rotation: Rotation | None = None

    weights: ClassVar = tuple(role.name for role in _ROLES if role.is_weight)

    def __post_init__(self) -> None:
        for operand in OPERANDS:
            format = self.format(operand)
            two_d = format is not None and isinstance(format.block_size, tuple)
            if two_d and operand not in self.weights:
                raise ValueError(f"{operand}={format}: 2-D blocks are for weights {self.weights}")
        if self.reuse_fprop_weight and (self.dgrad_weight or not self.fprop_weight):
            raise ValueError(
                f"reuse_fprop_weight with dgrad_weight={self.dgrad_weight} and fprop_weight="
                f"{self.fprop_weight}: it needs a fprop_weight format, and dgrad_weight=None"
            )
        if (
            self.reuse_fprop_weight
            and self.fprop_weight
            and self.fprop_weight.outer is OuterScale.ROW
        ):
            raise ValueError(
                f"reuse_fprop_weight of {self.fprop_weight}: dgrad contracts over the rows, whose "
                "scales could not stay outside its product"
            )
        if self.reuse_fprop_weight and (self.fprop_rotation or self.dgrad_rotation):
            raise ValueError(
                "reuse_fprop_weight with a rotation of fprop or dgrad: the axes differ"
            )
        for gemm in GEMMS:
            if self.rotation(gemm) and not self.quantizes(gemm):
                raise ValueError(f"{gemm}_rotation has no effect: {gemm} has no quantized operand")

    def role(self, operand: str) -> Role:
        """The role of what takes the place of this operand: fprop's weight where it is reused."""
        reused = operand == "dgrad_weight" and self.reuse_fprop_weight
        return ROLES["fprop_weight" if reused else operand]

    def format(self, operand: str) -> BlockFormat | None:
        """The format of an operand named in OPERANDS."""
        value: BlockFormat | None = getattr(self, operand)
        return value

    def rotation(self, gemm: str) -> Rotation | None:
        """The rotation of both operands of a GEMM named in GEMMS."""
        value: Rotation | None = getattr(self, f"{gemm}_rotation")
        return value

    def quantizes(self, gemm: str) -> bool:
        """Whether an operand of this GEMM is quantized."""
        reused = gemm == "dgrad" and self.reuse_fprop_weight
        return reused or any(self.format(operand) for operand in GEMMS[gemm])

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is quantized."""
        return not any(self.format(operand) for operand in OPERANDS)

    @property
    def is_random(self) -> bool:
        """Whether any operand is rounded stochastically, or rotated by signs of each step."""
        formats = map(self.format, OPERANDS)
        is_stochastic = any(f is not None and f.rounding is Rounding.STOCHASTIC for f in formats)
        return is_stochastic or self.redraws

    @property
    def redraws(self) -> bool:
        """Whether every step draws the signs of a rotation."""
        rotations = map(self.rotation, GEMMS)
        return any(rotation is not None and rotation.seed == "step" for rotation in rotations)

    def with_signs(self, seed: int) -> "QuantRecipe":
        """This recipe in a step whose signs `seed` draws."""
        changes: dict[str, object] = {
            f"{gemm}_rotation": replace(rotation, seed=seed)
            for gemm in GEMMS
            if (rotation := self.rotation(gemm)) and rotation.seed == "step"
        }
        return replace(self, **changes)  # type: ignore[arg-type]  # keys are fields

    def only(self, *gemms: str) -> "QuantRecipe":
        """This recipe for the named GEMMs, the baseline's numerics for the others.

        >>> QuantRecipe.uniform("mxint8").only("fprop").table()["dgrad_weight"]
        'bf16'
        """
        if unknown := set(gemms) - set(GEMMS):
            raise ValueError(f"unknown GEMM {sorted(unknown)}, expected some of {list(GEMMS)}")
        recipe = self
        if recipe.reuse_fprop_weight and "fprop" not in gemms and "dgrad" in gemms:
            raise ValueError("dgrad reuses fprop's weight copy: it cannot stay without fprop")
        for gemm in set(GEMMS) - set(gemms):
            changes: dict[str, object] = dict.fromkeys((*GEMMS[gemm], f"{gemm}_rotation"))
            if gemm == "dgrad":
                changes["reuse_fprop_weight"] = False
            recipe = replace(recipe, **changes)  # type: ignore[arg-type]  # keys are fields
        return recipe

    def table(self) -> dict[str, str]:
        """Operand -> what it gets, in words: `mxint8`, `bf16`, with its rotation."""
        rows = {}
        for gemm, operands in GEMMS.items():
            for operand in operands:
                text = str(self.format(operand) or "bf16")
                if operand == "dgrad_weight" and self.reuse_fprop_weight:
                    text = f"fprop's {self.fprop_weight}"
                if rotation := self.rotation(gemm):
                    signs = "" if rotation.seed is None else f", signs {rotation.seed}"
                    text += f" hadamard({rotation.size}{signs})"
                rows[operand] = text
        return rows

    @classmethod
    def uniform(cls, format: BlockFormat | str) -> "QuantRecipe":
        """All six operands in one format, each blocked along its own GEMM's contraction axis."""
        if isinstance(format, str):
            format = block_format(format)
        return cls(format, format, format, format, format, format)


@dataclass(frozen=True)
class Phase:
    """From the fraction `start` of the optimizer steps on, only the named GEMMs stay quantized."""

    start: float
    gemms: tuple[str, ...] = ()  #: of GEMMS; none: the baseline's numerics everywhere

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ValueError(f"phase start={self.start} is not a fraction of the steps in 0 .. 1")
        if set(self.gemms) - set(GEMMS) or len(set(self.gemms)) < len(self.gemms):
            raise ValueError(f"phase gemms={list(self.gemms)}: different ones of {list(GEMMS)}")

    def first_step(self, max_steps: int) -> int:
        """The first update, counted from 0, that it governs.

        >>> Phase(0.8).first_step(150), Phase(0.55).first_step(100)
        (120, 55)
        """
        return math.ceil(Fraction(str(self.start)) * max_steps)  # as written: 0.55 is 11/20 exactly
