"""`lowbit export`: a quantized model as files that other people's engines load."""

import argparse
from pathlib import Path
from typing import Any

from train.export import fp_quant
from train.export.card import card
from train.export.folder import check_target, put, seal, staging
from train.export.layouts import LAYOUTS, Layout, check_holds, write_model
from train.export.reload import compare
from train.export.source import check_finite, is_run, of_quantized, of_run
from train.quantized.layout import is_ours
from train.quantized.model import QuantizedModel
from train.quantized.tensors import write_bytes
from train.runs.provenance import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "source",
        metavar="OUT",
        type=Path,
        help="what `lowbit quantize` left, or a run, whose recipe says the formats",
    )
    parser.add_argument("target", metavar="DIR", type=Path,
                        help="new or empty folder, or an earlier export")  # fmt: skip
    parser.add_argument("--layout", required=True, choices=[*LAYOUTS], help="docs/export.md")
    parser.add_argument("--pseudoquant", action="store_true",
                        help="fp_quant: decoded weights in place of codes")  # fmt: skip
    parser.add_argument("--figures", type=Path, metavar="EVAL_JSON",
                        help="what `lowbit eval --out` left, for the model card")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the folder, read it back, compare; it is there at the end or not at all."""
    check_target(args.target)
    layout = LAYOUTS[args.layout]
    if args.pseudoquant and layout.name != fp_quant.NAME:
        raise ValueError(f"--pseudoquant has no effect on {layout.name}: it is {fp_quant.NAME}'s")
    if args.figures is not None and not args.figures.is_file():
        raise FileNotFoundError(f"--figures {args.figures}: no such file")
    model = read_source(args.source, layout)
    check_finite(model)
    check_holds(model, layout)
    mark: dict[str, Any] = {
        "layout": layout.name,
        "source": model.source,
        "command": command_line(),
    }
    mark["method"] = dict(model.method)  # with what it was calibrated on
    with staging(args.target) as place:
        digests, said = write_model(model, layout, place, pseudo=args.pseudoquant)
        seal(place, digests, mark)
        said.append(compare(place, model))
        text = card(model, layout, said, args.figures, " ".join(command_line()))
        digests["README.md"] = write_bytes(place / "README.md", text.encode())
        seal(place, digests, mark)
        size = sum(path.stat().st_size for path in place.iterdir())
        put(place, args.target)
    formats = ", ".join(map(str, model.formats))
    print(
        f"{args.target}: {len(model.layers)} layers of {formats} as {layout.name}, {size:,} bytes"
    )
    print("\n".join(said))
    return 0


def read_source(source: Path, layout: Layout) -> QuantizedModel:
    """ValueError for what is neither a run nor what `lowbit quantize` left."""
    if is_run(source):
        return of_run(source, fuse=layout.fuses)
    if is_ours(source):
        return of_quantized(source)
    raise ValueError(f"{source} is neither a run nor what `lowbit quantize` left")
