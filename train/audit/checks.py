"""What must hold of a quantizer that rounds to nearest, each as a count of values that break it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from lowbit import BlockFormat, IntFormat, fake_quantize, qsnr_db
from train.audit.inputs import BLOCKS, finite_kinds, special_kinds

Quantizer = Callable[[Tensor], Tensor]
Count = tuple[int, int, str]  #: values that break a check, of how many, and what to say of it


@dataclass(frozen=True)
class Subject:
    """Who is audited: values in, those that a format holds out, in blocks along the last axis."""

    quantize: Quantizer
    format: BlockFormat  #: that it claims to compute
    dtype: torch.dtype
    device: str

    def reference(self, x: Tensor) -> Tensor:
        """What the format's definition gives, where `x` is."""
        return fake_quantize(x.cpu(), self.format).to(x.device)

    def placed(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


class Verdict(Enum):
    """What a line of the report says; only FAILED fails an audit."""

    HOLDS = "holds"
    FAILED = "FAILED"
    DIFFERS = "differs"  # on what formats leave open: what is not finite, or at FP32's lower end
    REFUSED = "refused"  # a shape or a layout, by an exception
    NOT_OWN = "not the format's"  # the definition breaks it too


@dataclass(frozen=True)
class Finding:
    """One line of the report: `wrong` of `of` values break the check."""

    check: str
    verdict: Verdict
    wrong: int = 0
    of: int = 0
    detail: str = ""


def different(found: Tensor, expected: Tensor, format: BlockFormat) -> Tensor:
    """Where bits differ; NaN equals NaN, and integer codes hold no sign of zero."""
    unequal = found != expected
    if not isinstance(format.element, IntFormat):
        unequal = unequal | (found.signbit() != expected.signbit())
    return unequal & ~(found.isnan() & expected.isnan())


def equality(subject: Subject, seed: int) -> Iterator[Finding]:
    """Bit for bit the format's values, on all kinds of data."""
    for name, drawn in finite_kinds(subject.format, seed).items():
        yield judged(f"values: {name}", partial(_equal, subject, drawn))
    for name, drawn in special_kinds(subject.format).items():
        found = judged(f"values: {name}", partial(_equal, subject, drawn), Verdict.REFUSED)
        failed = found.verdict is Verdict.FAILED
        yield replace(found, verdict=Verdict.DIFFERS) if failed else found


def _equal(subject: Subject, drawn: Tensor) -> Count:
    x = subject.placed(drawn)
    found, expected = subject.quantize(x.clone()), subject.reference(x)
    if found.shape != x.shape or found.dtype != x.dtype or found.device != x.device:
        got = f"{tuple(found.shape)} {found.dtype} on {found.device}"
        return max(x.numel(), 1), x.numel(), f"{tuple(x.shape)} {x.dtype} became {got}"
    wrong = different(found, expected, subject.format)
    if not bool(wrong.any()):
        return 0, x.numel(), ""
    at = tuple(int(i) for i in wrong.nonzero()[0])
    detail = f"first at {list(at)}: {x[at]:.9g} -> {found[at]:.9g}, not {expected[at]:.9g}"
    return int(wrong.sum()), x.numel(), detail


Property = Callable[[Quantizer, Tensor], tuple[Tensor, Tensor]]


def _written(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    before = x.clone()
    f(x)
    return x, before


def _strided(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    return f(x.T.contiguous().T), f(x)


def _leading_axes(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    return f(x.reshape(2, -1, x.shape[1])).flatten(0, 1), f(x)


def _blocks(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    block = x.shape[1] // BLOCKS
    changed = x.clone()
    changed[:, :block] *= 0.25  # no maximum of a row or a tensor rises
    return f(changed)[:, block:], f(x)[:, block:]


def _causal(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    changed = x.clone()
    changed[-1] *= 1024
    return f(changed)[:-1], f(x)[:-1]


def _halved(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    half = len(x) // 2
    return f(x[:half]), f(x)[:half]


def _repeated(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    first = f(x.clone()).clone()
    f(x.clone() * 100)  # a quantizer that remembers
    return f(x.clone()), first


def _not_finite(f: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the result is no number, against the blocks that hold none."""
    block = x.shape[1] // BLOCKS
    changed, expected = x.clone(), torch.zeros_like(x)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        changed[row, row * block] = value
        expected[row, row * block] = 1.0
    bad = (~f(changed).isfinite()).to(x.dtype)
    bad.view(-1, BLOCKS, block)[[0, 1, 2], [0, 1, 2], 1:] = (
        0.0  # the rest of such a block is left open
    )
    return bad, expected


LAYOUTS: dict[str, Property] = {
    "strided input as contiguous": _strided,
    "leading axes are rows": _leading_axes,
}
PROPERTIES: dict[str, Property] = {
    "repeatable, whatever came between": _repeated,
    "leaves its input as it was": _written,
    "odd: f(-x) = -f(x)": lambda f, x: (f(-x), -f(x)),
    "idempotent: f(f(x)) = f(x)": lambda f, x: (f(f(x)), f(x)),
    "equivariant: f(8 x) = 8 f(x)": lambda f, x: (f(8 * x), 8 * f(x)),
    "a block's values are its own": _blocks,
    "NaN and infinities stay such, in their block": _not_finite,
    "rows in another order": lambda f, x: (f(x.flip(0)), f(x).flip(0)),
    "causal: a later row moves no earlier one": _causal,
    "batch invariant: half the rows as of all": _halved,
}


def properties(subject: Subject, seed: int) -> Iterator[Finding]:
    """On Gaussian data with an outlier; what the format itself does not have is no fault."""
    x = subject.placed(finite_kinds(subject.format, seed)["Gaussian"])
    x[-1, 0] = 50.0

    def broken(quantize: Quantizer, check: Property) -> Count:
        found, expected = check(quantize, x.clone())
        return int(different(found, expected, subject.format).sum()), found.numel(), ""

    for name, check in (PROPERTIES | LAYOUTS).items():
        if broken(subject.reference, check)[0]:
            yield Finding(name, Verdict.NOT_OWN, detail=f"{subject.format} has it not")
        else:
            raised = Verdict.REFUSED if name in LAYOUTS else Verdict.FAILED
            yield judged(name, partial(broken, subject.quantize, check), raised)


def error(subject: Subject, seed: int) -> Iterator[Finding]:
    """Of the decoded values on Gaussian data, not a hundredth of a decibel above the format's."""
    x = subject.placed(finite_kinds(subject.format, seed)["Gaussian"])

    def measured() -> Count:
        found = float(qsnr_db(x.float(), subject.quantize(x.clone()).float()))
        own = float(qsnr_db(x.float(), subject.reference(x).float()))
        return int(not found >= own - 0.01), 1, f"QSNR {found:.2f} dB, the format's {own:.2f}"

    yield judged("error of the decoded values", measured)


def judged(check: str, measured: Callable[[], Count], raised: Verdict = Verdict.FAILED) -> Finding:
    """The finding; whatever the quantizer raises is one too."""
    try:
        wrong, of, detail = measured()
    except Exception as error:  # anybody's code
        said = " ".join(str(error).split())[:100]
        return Finding(check, raised, detail=f"raised {type(error).__name__}: {said}")
    return Finding(check, Verdict.FAILED if wrong else Verdict.HOLDS, wrong, of, detail)
