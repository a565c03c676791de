"""What is asked of `lowbit quantize`: a recipe's fields, each of them a flag."""

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowbit import BlockFormat, Transform
from lowbit.definition.transforms import NAMES
from lowbit.ptq import Observer, Order, Search, Solver
from train.config.formats import read_format, write_format
from train.config.strict_yaml import load_yaml
from train.quantized.layout import check_stored

INPUTS = ("original", "propagated", "quantized")


@dataclass(frozen=True)
class Method:
    """All that decides which numbers come out; ValueError for what contradicts itself."""

    format: BlockFormat
    activations: BlockFormat | None = None
    method: str = "gptq"
    observer: str = "mse"
    search: str | None = None  #: of observer mse: after the cast, or before it (FP-Quant)
    weighting: str | None = None  #: of search after: hessian, or none
    reach: float | None = None
    four_thirds: bool = False
    order: str | None = None
    damping: float | None = None
    alpha: float = 0.0
    inputs: str | None = None
    transform: str = "identity"
    transform_size: int | None = None
    transform_seed: int | None = None

    def __post_init__(self) -> None:
        check_stored(self.format)
        _one_of("method", self.method, ("rtn", "gptq"))
        _one_of("observer", self.observer, ("minmax", "mse"))
        if self.method == "rtn":
            self._has_no(
                "--method rtn", order=self.order, damping=self.damping, alpha=self.alpha or None
            )
        if self.observer == "minmax":
            self._has_no("--observer minmax", search=self.search, weighting=self.weighting)
        _one_of("search", self.search or "after", ("before", "after"))
        _one_of("weighting", self.weighting or "none", ("none", "hessian"))
        if self.search == "before" and self.weighting == "hessian":
            raise ValueError("--weighting hessian has no effect on --search before")
        if self.method == "gptq" or self.weighting == "hessian":
            _one_of("inputs", self.inputs or INPUTS[0], INPUTS)
        else:
            self._has_no("rounding without a Hessian", inputs=self.inputs)
        if self.alpha and self.inputs in (None, "original"):
            raise ValueError(f"--alpha {self.alpha}: needs --inputs propagated or quantized")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"--alpha {self.alpha} is not in 0 .. 1 (0.25 helps, 1 may diverge)")
        if self.inputs == "quantized" and self.activations is None:
            raise ValueError("--inputs quantized needs --activations")
        self.scales().check(self.format)
        self.solver()
        self.turning()

    def _has_no(self, what: str, **without_effect: object) -> None:
        for name, value in without_effect.items():
            if value is not None:
                raise ValueError(f"--{name} {value} has no effect with {what}")

    @property
    def calibrates(self) -> bool:
        """Whether a text has to run through the model."""
        return self.method == "gptq" or self.is_weighted

    @property
    def is_weighted(self) -> bool:
        """Whether the search weighs errors by the Hessian's diagonal: GPTQ's, which has one."""
        if self.observer != "mse" or self.search == "before":
            return False
        return (self.weighting or ("hessian" if self.method == "gptq" else "none")) == "hessian"

    @property
    def hessian_of(self) -> str | None:
        """Whose inputs the Hessian is made of."""
        return (self.inputs or INPUTS[0]) if self.calibrates else None

    def scales(self) -> Observer:
        """How scales are chosen."""
        search = Search(self.search or "after") if self.observer == "mse" else Search.ABSMAX
        return Observer(search, self.reach, self.four_thirds)

    def solver(self) -> Solver:
        """GPTQ's settings."""
        _one_of("order", self.order or "activation", tuple(order.value for order in Order))
        damping = 0.01 if self.damping is None else self.damping
        return Solver(Order(self.order or "activation"), damping)

    def turning(self) -> Transform | None:
        """The transform; None for the identity."""
        if self.transform == "identity":
            self._has_no(
                "--transform identity",
                transform_size=self.transform_size, transform_seed=self.transform_seed,
            )  # fmt: skip
            return None
        _one_of("transform", self.transform, NAMES)
        size = self.transform_size
        if size is None:
            if not isinstance(self.format.block_size, int) or self.format.block_size < 1:
                raise ValueError(f"--transform {self.transform} of {self.format} needs a size")
            size = self.format.block_size
        seed = self.transform_seed
        if seed is None and self.transform in NAMES[5:]:
            seed = 0
        return Transform(self.transform, size, seed)

    def resolved(self) -> dict[str, Any]:
        """Every field as it took effect, as plain data."""
        solver, turned = self.solver(), self.turning()
        found = asdict(self) | {
            "format": write_format(self.format),
            "activations": self.activations and write_format(self.activations),
            "search": self.scales().search.value,
            "weighting": "hessian" if self.is_weighted else "none",
            "order": solver.order.value if self.method == "gptq" else None,
            "damping": solver.damping if self.method == "gptq" else None,
            "inputs": self.hessian_of,
            "transform_size": turned and turned.size,
            "transform_seed": turned and turned.seed,
        }
        return found


def _format(value: Any) -> BlockFormat:
    try:
        return read_format(value)
    except TypeError:
        raise ValueError(f"{value} has a field that block formats lack") from None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"--{name} {value!r}: expected one of {', '.join(known)}")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; None where not given, so that a recipe's field stays."""
    add = parser.add_argument
    add("--recipe", type=Path, metavar="YAML", help="fields of these names, see configs/ptq")
    add("--format", metavar="F", help="of weights, by name or as {name: F, field: value}")
    add("--activations", metavar="F", help="format of the layers' inputs (default: unquantized)")
    add("--method", help="rtn or gptq (default)")
    add("--observer", help="minmax (largest magnitude) or mse (search, the default)")
    add("--search", help="of mse: after the cast, among scales that exist (default), or before it")
    add("--weighting", help="of search after: hessian (GPTQ's default) or none")
    add("--reach", type=float, help="what a block's largest magnitude becomes, of FP32 scales")
    add("--four-thirds", action="store_true", default=None, help="FP-Quant's scales of mxfp4")
    add("--order", help="of GPTQ's columns: activation (default) or default, as they lie")
    add("--damping", type=float, help="of the Hessian's mean diagonal (default: 0.01)")
    add("--alpha", type=float, help="shift towards full-precision inputs, 0 (default) .. 1")
    add("--inputs", help="the Hessian's: of the original model (default), propagated, quantized")
    add("--transform", help=f"of both operands: {', '.join(NAMES)}")
    add("--transform-size", type=int, metavar="N", help="default: the format's block size")
    add("--transform-seed", type=int, metavar="N", help="of random matrices and signs")


def read_method(args: argparse.Namespace) -> Method:
    """The recipe's fields with the flags over them."""
    names = [field.name for field in fields(Method)]
    plain: dict[str, Any] = {}
    if args.recipe is not None:
        found = load_yaml(args.recipe.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or (unknown := sorted(found.keys() - set(names))):
            what = unknown[0] if isinstance(found, dict) else "no mapping"
            raise ValueError(f"{args.recipe}: {what}, expected fields {', '.join(names)}")
        plain = found
    for name in names:
        if (value := getattr(args, name)) is not None:
            plain[name] = load_yaml(value) if name in ("format", "activations") else value
    if plain.get("format") is None:
        raise ValueError("--format is missing, and no --recipe names one")
    for name in ("format", "activations"):
        if plain.get(name) is not None:
            plain[name] = _format(plain[name])
    return Method(**plain)
