"""The study's claims on a real model: QSNR of its operands, KL divergence of direct casts."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lowbit import BlockFormat, QuantRecipe, ScaleFormat, ScaleRule, block_format, convert_linears
from train.analysis.analyze import crest_table, win_table
from train.analysis.evaluate import cast_recipe
from train.analysis.formats import BLOCK_SCALED
from train.analysis.operands import Look, observe
from train.analysis.scores import evaluate
from train.reproduce.claims import Claim
from train.subjects.models import load_subject
from train.subjects.text import read_text

FIGURE_4 = {"mxint8 / mxfp8": (40.35, 31.50, 100.0), "mxint6 / mxfp6": (28.57, 30.39, 0.1)} | {
    "mxint4 / mxfp4": (15.89, 17.98, 0.3), "nvint4 / nvfp4": (20.55, 20.60, 64.3)
}  # fmt: skip
"""Mean QSNR in dB of integer and float, share of tensors in % where the integer wins."""
TABLE_2 = {"-1": 11.97, "32": 2.96, "16": 2.39}
"""Third quartile of the crest factor by block size."""
OTHER_MODEL = "another model: Llama-3.1-8B there, {} here"


def qsnr_claims(args: argparse.Namespace) -> Iterator[Claim]:
    """Figure 4 and Table 2, on one window of text."""
    subject = load_subject(args.model, args.cache)
    text = read_text(subject, _text(args, windows=1, seq_len=256 if args.fast else 2048))
    look = Look(tuple(map(block_format, BLOCK_SCALED)))
    found = observe(subject.model, text, look, ["*layers*"])
    why = OTHER_MODEL.format(subject.source.partition(" ")[0])
    for row in win_table(found.qsnr):
        integer, floating, wins = FIGURE_4[row["pair"]]
        yield Claim(
            "QSNR, real model (Fig. 4)", f"{row['pair']}: dB, integer wins",
            f"{integer} / {floating}, {wins} %",
            f"{row['integer']} / {row['float']}, {row['integer wins %']} %",
            (wins > 50) == (row["integer wins %"] > 50),
            f"{why}; agreement: the same format wins on most of {row['tensors']} tensors",
        )  # fmt: skip
    for row in crest_table(found.crest):
        published = TABLE_2[row["block"]]
        yield Claim(
            "crest factor (Table 2)", f"third quartile, block {row['block']}", f"{published}",
            f"{row['Q3']}", abs(row["Q3"] - published) <= 0.1 * published,
            f"{why}; agreement: within 10 %",
        )  # fmt: skip


EARLIER = ("mxint8", "mxint6", "mxfp8", "nvfp4", "mxfp4")
"""The order of an earlier weight-only measurement on this model, by rising KL."""
KL_PAIRS = {
    ("mxint8", "mxfp8"): (True, True), ("mxint6", "mxfp6"): (False, None),
    ("mxint4", "mxfp4"): (False, None), ("nvint4", "nvfp4"): (False, True),
}  # fmt: skip
"""Which wins on most of the study's 12 models, plain and with Hadamard: the integer?"""


def kl_claims(args: argparse.Namespace) -> Iterator[Claim]:
    """Table 3, and the order of formats by KL under three conventions of the scale."""
    subject = load_subject(args.model, args.cache)
    windows, seq_len = (1, 256) if args.fast else (3, 1024)
    text = read_text(subject, _text(args, windows=windows, seq_len=seq_len))
    recipes = {"bf16": QuantRecipe()}
    for pair, (_, rotated) in KL_PAIRS.items():
        for name in pair:
            recipes[name] = cast_recipe(block_format(name), False, "none")
            if rotated is not None:
                recipes[f"{name} rotated"] = cast_recipe(block_format(name), False, "block")
    conventions = {"rceil": EARLIER, "fp32": EARLIER[:3], "floor": ("mxint8", "mxint6", "mxfp8")}
    for scale, names in (*conventions.items(), ("floor", ("mxfp4",))):
        for name in names:
            recipes[f"{name} {scale}"] = QuantRecipe(fprop_weight=_scaled(name, scale))
    model = convert_linears(subject.model, QuantRecipe(), ("lm_head",))
    kl = {name: float(np.mean(s.kl)) for name, s in evaluate(model, recipes, text).items()}
    size = f"{windows} x {seq_len} tokens"
    for pair, winners in KL_PAIRS.items():
        for suffix, integer_wins in zip(("", " rotated"), winners, strict=True):
            if integer_wins is not None:
                yield _pair_claim(pair, suffix, integer_wins, kl, size)
    yield from _order_claims(kl, size)


def _pair_claim(
    pair: tuple[str, str], suffix: str, integer_wins: bool, kl: dict[str, float], size: str
) -> Claim:
    found = [kl[name + suffix] for name in pair]
    winner = pair[0] if integer_wins else pair[1]
    return Claim(
        "KL, direct cast (Table 3)", f"{' against '.join(pair)}{suffix}: lower KL",
        winner, f"{pair[found[0] > found[1]]} ({found[0]:.4f} / {found[1]:.4f})",
        (found[0] < found[1]) == integer_wins,
        f"inputs and weights, {size}, SmolLM2-135M here, twelve models of 0.6B to 235B there",
    )  # fmt: skip


def _order_claims(kl: dict[str, float], size: str) -> Iterator[Claim]:
    def order(keys: list[str]) -> tuple[str, list[str]]:
        names = {key: key.split()[0] for key in sorted(keys, key=kl.__getitem__)}
        return " < ".join(f"{n} {kl[k]:.4f}" for k, n in names.items()), list(names.values())

    expected = " < ".join(EARLIER)
    text, names = order([f"{name} rceil" for name in EARLIER])
    yield Claim(
        "KL order, weights only", "UE8M0 scales rounded up (the study's rule)", expected, text,
        names == list(EARLIER),
        f"{size}; mxint6 has 2.1 dB less QSNR than mxfp8 on Gaussian data: the earlier order mixed"
        " conventions, see the last row",
    )  # fmt: skip
    for scale, words in (("fp32", "FP32 scales for all"), ("floor", "OCP floor rule for all")):
        text, names = order([f"{name} {scale}" for name in EARLIER[:3]])
        yield Claim(
            "KL order, weights only", f"{words}: 8- and 6-bit formats", " < ".join(EARLIER[:3]),
            text, names == list(EARLIER[:3]), f"{size}; no single convention gives that order",
        )  # fmt: skip
    mixed = ["mxint8 fp32", "mxint6 fp32", "mxfp8 floor", "nvfp4 rceil", "mxfp4 floor"]
    text, names = order(mixed)
    yield Claim(
        "KL order, weights only", "integers with FP32 scales, floats with the floor rule",
        expected, text, names == list(EARLIER), f"{size}; what the earlier one had compared",
    )  # fmt: skip


def _scaled(name: str, scale: str) -> BlockFormat:
    if scale == "fp32":
        return block_format(name, scale=ScaleFormat.FP32, scale_rule=None)
    format = block_format(name)
    return replace(format, scale_rule=ScaleRule.FLOOR) if scale == "floor" else format


def _text(args: argparse.Namespace, windows: int, seq_len: int) -> argparse.Namespace:
    settings = {"text": "wiki", "tokenizer": None, "windows": windows, "seq_len": seq_len}
    return argparse.Namespace(**settings, cache=args.cache)
