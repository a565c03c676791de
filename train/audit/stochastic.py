"""What must hold of a quantizer that rounds stochastically: neighbours, mean, independent draws."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit import Rounding, quantize
from lowbit.definition.blocks import from_blocks, to_blocks
from train.audit.checks import Count, Finding, Subject, Verdict, judged
from train.audit.inputs import BLOCKS, finite_kinds

DRAWS, ROWS = 64, 64
SIGMAS = 5.0  # of a normal variable: by chance once in two million checks


@dataclass(frozen=True)
class Neighbours:
    """Of each value the format's next value below and above, and how far it lies between them."""

    below: Tensor
    above: Tensor
    part: Tensor  #: 0 at `below`, 1 at `above`: the probability of the latter

    @property
    def drawn(self) -> Tensor:
        """Where a draw decides, and a few dozen of them show its probability."""
        return (self.part > 0.05) & (self.part < 0.95)


def neighbours(x: Tensor, subject: Subject) -> Neighbours:
    """By search among all values of the element, under the scales of rounding to nearest."""
    format = replace(subject.format, rounding=Rounding.NEAREST)
    stored = quantize(x.cpu(), format)
    scale = stored.scale_values() * (1.0 if stored.outer_scale is None else stored.outer_scale)
    blocks, inside = to_blocks(torch.ones(x.shape), format.block_size, -1)
    spread = from_blocks(blocks * scale.unsqueeze(inside[0]), inside, x.shape).double()
    values = torch.tensor(sorted(set(format.element.values)), dtype=torch.float64)
    y = (x.cpu().double() / spread).clamp(values[0], values[-1])
    upper = torch.searchsorted(values, y).clamp(1, len(values) - 1)
    low, high = values[upper - 1], values[upper]
    return Neighbours(low * spread, high * spread, (y - low) / (high - low))


def drawn(subject: Subject, seed: int) -> Iterator[Finding]:
    """All checks, from 64 draws for each of two tensors in turn."""
    torch.manual_seed(seed)
    both = [
        subject.placed(finite_kinds(subject.format, seed + i)["Gaussian"][:ROWS]) for i in (0, 1)
    ]
    found: list[list[Tensor]] = [[], []]

    def draw() -> Count:
        for _ in range(DRAWS):
            for x, own in zip(both, found, strict=True):
                own.append(subject.quantize(x.clone()).cpu().double())
        first = found[0][0]
        return int(first.shape != both[0].shape), 1, f"shape {tuple(first.shape)}"

    made = judged(f"{2 * DRAWS} draws are made", draw)
    yield made
    if made.verdict is Verdict.FAILED:
        return
    places = [neighbours(x, subject) for x in both]
    draws = [torch.stack(own) for own in found]
    yield _between(draws[0], places[0])
    signs = [_standardized(own, place) for own, place in zip(draws, places, strict=True)]
    yield from _mean(signs[0], both[0].cpu(), draws[0])
    yield from _independent(*signs)


def _between(draws: Tensor, place: Neighbours) -> Finding:
    allowed = _near(draws, place.below) | _near(draws, place.above) & (place.part > 0)
    wrong = int((~allowed).sum())
    verdict = Verdict.FAILED if wrong else Verdict.HOLDS
    return Finding("each value is the next one below or above", verdict, wrong, draws.numel())


def _near(draws: Tensor, value: Tensor) -> Tensor:
    """Equal but for what the output's dtype (BF16 at worst) rounds."""
    return (draws - value).abs() <= value.abs() * 2.0**-8


def _standardized(draws: Tensor, place: Neighbours) -> Tensor:
    """Of each draw, mean 0 and variance 1; 0 where no draw decides."""
    up = (draws - place.below) / (place.above - place.below)
    spread = (place.part * (1 - place.part)).sqrt()
    return torch.where(place.drawn, (up - place.part) / spread, 0.0).nan_to_num()


def _mean(signs: Tensor, x: Tensor, draws: Tensor) -> Iterator[Finding]:
    decided = signs.ne(0).any(0)
    z = signs.mean(0)[decided] * math.sqrt(len(signs))
    count = len(z)
    for name, weight in {
        "up": torch.ones(count),
        "to larger magnitudes": x.sign()[decided],
    }.items():
        bias = float((z * weight).sum()) / math.sqrt(count)
        yield _within(f"the mean of {DRAWS} draws is not moved {name}", bias, count)
    excess = float((z.square().mean() - 1) * math.sqrt(count / 2))
    errors = [(draws[:b].mean(0) - x.double())[decided].square().mean().sqrt() for b in (1, DRAWS)]
    fall = float(errors[0] / errors[1])
    best = math.sqrt(DRAWS)
    detail = f"z {excess:+.1f}; the error falls {fall:.2f}-fold, {best:.0f} without a bias"
    nears = _within("each value's mean nears it as 1/sqrt(draws)", max(excess, 0.0), count)
    yield replace(nears, detail=detail)


def _independent(one: Tensor, other: Tensor) -> Iterator[Finding]:
    block = one.shape[2] // BLOCKS
    pairs = {
        "calls": (one[1:], one[:-1]),
        "two calls apart": (one[2:], one[:-2]),
        "tensors of one shape": (one, other),
        "rows": (one[:, 1:], one[:, :-1]),
        "blocks of a row": (one[..., block:], one[..., :-block]),
        "neighbouring values": (one[..., 1:], one[..., :-1]),
    }
    for name, (a, b) in pairs.items():
        both = (a != 0) & (b != 0)
        count = int(both.sum())
        z = float((a * b)[both].sum()) / math.sqrt(max(count, 1))
        yield _within(f"draws independent: {name}", z, count)


def _within(check: str, z: float, count: int) -> Finding:
    verdict = Verdict.HOLDS if abs(z) <= SIGMAS else Verdict.FAILED
    return Finding(check, verdict, of=count, detail=f"z {z:+.1f}")
