"""`lowbit quantize`: a model's linear layers in a block format, without training."""

import argparse
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.ptq.calibration import add_calibration_arguments, calibration
from train.ptq.request import Method, add_method_arguments, read_method
from train.ptq.skeleton import Skeleton, readers
from train.ptq.solve import Found, solve
from train.ptq.source import Source, open_source
from train.ptq.streams import Group, Inputs, Moments, Streams, advance, moments
from train.ptq.work import Work, already_done
from train.quantized.layout import StoredLayer, write
from train.quantized.overlap import fingerprints
from train.quantized.tensors import Entry
from train.subjects.models import HELP
from train.subjects.text import Text

Said = dict[str, dict[str, Any]]  #: of layers, by name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for what comes out")
    add_method_arguments(parser)
    add_calibration_arguments(parser)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Quantize block by block, go on where a kill stopped it, and leave OUT whole or not at all."""
    method = read_method(args)
    source = open_source(args.model, args.cache)
    skeleton = Skeleton(source)
    check_widths(skeleton, method)
    text = calibration(source, args, needed=method.calibrates)
    request = {
        "source": {"model": source.name, "sha256": source.sha256},
        "method": method.resolved() | {"calibration": text and _said_of(text)},
        "versions": _versions(),
    }
    if already_done(args.out, request):
        print(f"{args.out} is what this command leaves: nothing to do")
        return 0
    with Work(args.out, request) as work:
        try:
            layers = quantize_blocks(skeleton, method, None if text is None else text.inputs, work)
        except ValueError:
            work.remove()  # of input that will not get better
            raise
        entries = _entries(source, layers, work, len(skeleton.blocks))
        write(args.out, entries, {**request, "layers": layers}, source.files)
        work.remove()
    print(f"{args.out}: {len(layers)} layers of {source.name} in {method.format}")
    return 0


def check_widths(skeleton: Skeleton, method: Method) -> None:
    """ValueError for a layer that the format's blocks or the transform do not divide."""
    turned, formats = method.turning(), (method.format, method.activations)
    for index in range(len(skeleton.blocks)):
        for name, linear in skeleton.linears(index).items():
            if turned:
                turned.check_width(linear.in_features, name)
            for format in formats:
                size = format.block_size if format else 1
                if isinstance(size, int) and size > 0 and linear.in_features % size:
                    raise ValueError(
                        f"{format}'s blocks of {size} do not divide {name}'s "
                        f"{linear.in_features} inputs"
                    )


def quantize_blocks(skeleton: Skeleton, method: Method, windows: Tensor | None, work: Work) -> Said:
    """What is said of every layer; the blocks themselves are kept by `work`."""
    streams = None
    if windows is not None:
        both = method.hessian_of not in (None, "original")
        streams = Streams.begin(skeleton, windows, both=both)
    few = skeleton.calls(None)
    layers: Said = {}
    began, fresh, count = time.monotonic(), 0, len(skeleton.blocks)
    for index in range(count):
        known = work.finished(index)
        if known is None or streams is not None:
            with skeleton.block(index) as block:
                if known is None:
                    linears = skeleton.linears(index)
                    groups = readers(block, linears, few.hidden, few.others[index])
                    found = _solved(linears, groups, block, streams, index, method)
                    known, fresh = work.finish(index, found), fresh + 1
                    _tell(index, count, groups, known, (time.monotonic() - began) / fresh)
                elif streams is not None:
                    streams.original = advance(streams.original, block, streams.others[index])
                if streams is not None and streams.quantized is not None:
                    with _stored(block, f"{skeleton.prefix}.{index}", work.layers(index)):
                        streams.quantized = advance(streams.quantized, block, streams.others[index])
        layers |= known
    return layers


def _solved(
    linears: Mapping[str, nn.Linear],
    groups: list[Group],
    block: nn.Module,
    streams: Streams | None,
    index: int,
    method: Method,
) -> dict[str, Found]:
    seen: dict[Group, Moments] = {}
    if streams is not None:
        quantized = method.activations if method.hessian_of == "quantized" else None
        inputs = Inputs(method.turning(), quantized)
        seen = moments(block, groups, streams, index, inputs, cross=method.alpha > 0)
    found: dict[str, Found] = {}
    for group in groups:
        weights = {name: linears[name].weight for name in group}
        found |= solve(group, weights, method, seen.pop(group, None))
    return found


@contextmanager
def _stored(block: nn.Module, prefix: str, layers: Mapping[str, StoredLayer]) -> Iterator[None]:
    """The block with its layers as they were stored."""
    before = {name: block.get_submodule(name.removeprefix(f"{prefix}.")) for name in layers}

    def put(name: str, module: nn.Module) -> None:
        parent, _, child = name.removeprefix(f"{prefix}.").rpartition(".")
        setattr(block.get_submodule(parent), child, module)

    for name, layer in layers.items():
        bias = getattr(before[name], "bias", None)
        put(name, layer.module(None if bias is None else bias.detach()))
    try:
        yield
    finally:
        for name, module in before.items():
            put(name, module)


def _said_of(text: Text) -> dict[str, Any]:
    tokens = text.inputs.contiguous()
    return {
        "text": text.source,
        "windows": tokens.shape[0],
        "seq_len": tokens.shape[1],
        "tokens": tokens.numel(),
        "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "fingerprints": fingerprints(tokens),
    }


def _versions() -> dict[str, Any]:
    """All that may move a bit."""
    names = ("lowbit", "torch", "transformers", "numpy")
    return {name: version(name) for name in names} | {"threads": torch.get_num_threads()}


def _tell(index: int, count: int, groups: list[Group], said: Said, seconds: float) -> None:
    """A line a block: relative error of each layer, and the time that is left."""
    errors = ", ".join(
        f"{name.rpartition('.')[2]} {said[name]['error']:.2g}" for group in groups for name in group
    )
    raised = {said[n]["damping"] for g in groups for n in g if "damping" in said[n]}
    more = f"; damping {max(raised):g}" if len(raised) > 1 else ""
    left = seconds * (count - index - 1)
    print(
        f"block {index + 1}/{count}: relative error {errors}{more}; {seconds:.1f} s a block, "
        f"{left / 60:.1f} min left",
        flush=True,
    )


def _entries(source: Source, layers: Said, work: Work, blocks: int) -> Iterator[Entry]:
    """Of all that OUT holds: the source's, with the quantized weights replaced."""
    replaced = {f"{name}.weight" for name in layers}
    yield from (entry for name, entry in source.entries.items() if name not in replaced)
    for index in range(blocks):
        yield from work.entries(index)
