"""What the data pipeline costs: the loader, `lowbit prepare` against its tokenizer, peak memory.

python scripts/bench_data.py [--parts loader prepare memory] [--megabytes 5 50 500]
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.chunks import PIECE_CHARACTERS, cut
from data.corpus import corpus_documents
from data.order import BatchOrder
from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest, Shard, Split, TokenShards
from data.vocabulary import trained_vocabulary

SEQ_LEN = 2048
REPEATS = 5
BATCH = 100  # texts: small enough to stay in the processor's caches, where it is fastest
COPIES = {1: 1, 2: 4}  # of 10 MB of text: the start of worker processes shall weigh little


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process and of those it waited for: waiting does not add to it."""

    def now() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        usages = [resource.getrusage(kind) for kind in kinds]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start = now()
    work()
    return now() - start


def bench_loader(folder: Path) -> None:
    """Training batches in one process on one thread, from the page cache."""
    import torch  # here, since the workers of `prepare` import this file

    from data.module import Batch, Share, TrainingBatches, Windows

    torch.set_num_threads(1)
    shards = []
    for index in range(4):
        tokens = np.random.default_rng(index).integers(0, 2**16, 2**24, dtype=np.uint16)
        np.save(folder / f"train-{index:05d}.npy", tokens)
        shards.append(Shard(f"train-{index:05d}.npy", len(tokens), ""))
    split = Split(1, sum(shard.tokens for shard in shards), tuple(shards))
    manifest = Manifest("uint16", 2**16, 0, "", "", split, Split(0, 0, ()), 0, 0, {})
    windows = Windows(TokenShards(folder, manifest, "train"), SEQ_LEN)
    order = BatchOrder(len(windows), 512, 0, "benchmark")
    for size in (1, 8, 64):
        batches = iter(TrainingBatches(windows, order, Share(size, 0, 1, 512 // size), 0))

        def pass_over_data(batches: Iterator[Batch] = batches, count: int = 4096 // size) -> None:
            for _ in range(count):
                next(batches)

        rates = [4096 * SEQ_LEN / cpu_seconds(pass_over_data) / 1e6 for _ in range(REPEATS)]
        print(
            f"loader, micro-batch {size:2}: {statistics.median(rates):.0f} M tokens/s per core "
            f"({REPEATS} passes: {min(rates):.0f} to {max(rates):.0f})"
        )


def bench_prepare(folder: Path, cache: Path) -> None:
    """Processor time of `encode_batch_fast` alone, over that of preparing the same texts.

    They alternate, and each is compared with the mean of its neighbours: a core's speed drifts.
    """
    documents = corpus_documents("wiki", cache) + corpus_documents("shakespeare", cache)
    vocabulary = trained_vocabulary(documents, 4096)
    (folder / "tokenizer.json").write_text(vocabulary.json)
    texts = [piece for text in documents for piece, _ in cut([text], PIECE_CHARACTERS)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)

    def tokenize(copies: int) -> None:
        tokenizer = replace(vocabulary).tokenizer
        for start in range(0, copies * len(texts), BATCH):
            first = start % len(texts)
            tokenizer.encode_batch_fast(texts[first : first + BATCH])

    for workers, copies in COPIES.items():
        (folder / "texts.jsonl").write_text(rows * copies)
        request = PrepareRequest(
            text=(f"{folder}/texts.jsonl",), tokenizer=f"{folder}/tokenizer.json"
        )
        own, ratios = [cpu_seconds(partial(tokenize, copies))], []
        for repeat in range(REPEATS):
            out = folder / f"out-{workers}-{repeat}"
            took = cpu_seconds(partial(prepare, out, request, workers=workers))
            own.append(cpu_seconds(partial(tokenize, copies)))
            ratios.append((own[-1] + own[-2]) / 2 / took)
        speed = copies * sum(map(len, texts)) / statistics.median(own) / 1e6
        print(
            f"prepare, {workers} worker(s): {statistics.median(ratios):.0%} of the tokenizer's "
            f"{speed:.2f} M characters/s per core "
            f"({REPEATS} pairs: {min(ratios):.0%} to {max(ratios):.0%})"
        )


def peaks(group: int) -> dict[int, int]:
    """Peak resident megabytes so far of each process of a group."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may end while it is looked at
            if os.getpgid(int(path.name)) == group:
                line = (path / "status").read_text().partition("VmHWM:")[2]
                found[int(path.name)] = int(line.split()[0]) // 1024
    return found


def bench_memory(folder: Path, cache: Path, megabytes: list[int]) -> None:
    """Peak resident memory of `lowbit prepare` with two workers."""
    block = "".join(corpus_documents("wiki", cache))
    for size in megabytes:
        path = folder / f"{size}.txt"
        with path.open("w") as file:
            for _ in range(0, size * 10**6, len(block.encode())):
                file.write(block)
        command = [sys.executable, "-m", "train.cli", "prepare", f"{folder}/{size}", "--text"]
        command += [str(path)]
        command += ["--train-tokenizer", "4096", "--val-fraction", "0", "--workers", "2"]
        highest: dict[int, int] = {}
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, start_new_session=True
        ) as process:
            while process.poll() is None:
                highest |= peaks(process.pid)
                time.sleep(0.2)
        if process.returncode:
            raise SystemExit(f"prepare failed with {process.returncode}")
        parent = highest.pop(process.pid)
        print(
            f"prepare of {size} MB: peak {parent} MB in the parent, "
            f"{max(highest.values())} MB in the larger worker"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("loader", "prepare", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 50, 500])
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer alone is measured on one core
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for part in args.parts:
        with tempfile.TemporaryDirectory() as name:
            folder, cache = Path(name), Path(name) / "cache"
            match part:
                case "loader":
                    bench_loader(folder)
                case "prepare":
                    bench_prepare(folder, cache)
                case "memory":
                    bench_memory(folder, cache, args.megabytes)


if __name__ == "__main__":
    main()
