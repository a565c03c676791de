"""Time of GPTQ on SmolLM2-135M, and the memory that rounding a model of 1.2 B weights takes.

python scripts/bench_ptq.py [gptq] [memory] [--cache .cache]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from train.model.initial import empty_model
from train.quantized.tensors import Entry, write_bytes, write_tensors

BILLION = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
_QUANTIZE = "import sys; from train.cli import main; sys.exit(main(['quantize', *sys.argv[1:]]))"
_NOTHING = "import train.ptq.quantize, lowbit.bf16"


def peak(program: str, *arguments: str) -> tuple[float, float]:
    """Seconds, and GB that a process held at most."""
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after > before, "an earlier process held more"
    return time.perf_counter() - began, after * 1024 / 1e9


def random_billion(folder: Path) -> None:
    """BF16 weights of Llama-3.2-1B's shape, a tensor at a time."""
    generator = torch.Generator().manual_seed(0)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        def chunks() -> list[bytes]:
            values = 0.02 * torch.randn(shape, generator=generator)
            return [values.bfloat16().view(torch.uint8).numpy().tobytes()]

        return Entry(name, "BF16", shape, 2 * torch.Size(shape).numel(), chunks)

    names = {n: tuple(p.shape) for n, p in empty_model(BILLION).named_parameters()}
    write_tensors(folder, [entry(name, shape) for name, shape in names.items()])
    write_bytes(folder / "config.json", BILLION.to_json_string(use_diff=False).encode())


def main() -> None:
    """What was asked for, in the order in which peaks rise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["memory", "gptq"])
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        if "memory" in args.what:
            (folder / "1b").mkdir()
            random_billion(folder / "1b")
            _, idle = peak(_NOTHING)
            flags = ("--format", "mxfp4", "--method", "rtn", "--observer", "minmax")
            seconds, held = peak(_QUANTIZE, str(folder / "1b"), str(folder / "out"), *flags)
            print(f"RTN of 1.2 B weights: {held - idle:.2f} GB above {idle:.2f}, {seconds:.0f} s")
        if "gptq" in args.what:
            flags = ("--format", "mxfp4", "--transform", "hadamard", "--cache", str(args.cache))
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", _QUANTIZE, "smollm2", str(folder / "135m"), *flags],
                check=True,
            )
            seconds = time.perf_counter() - began
            print(f"GPTQ of 135 M weights, 8,192 tokens: {seconds:.0f} s")


if __name__ == "__main__":
    main()
