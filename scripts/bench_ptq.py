"""GPTQ and export of SmolLM2-135M, and the memory that rounding a model of 1.2 B weights takes.

python scripts/bench_ptq.py [memory] [gptq] [export] [--cache .cache]

Seconds are of the CPU: beside other processes a clock says nothing.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from lowbit import block_format
from train.model.initial import empty_model
from train.quantized.model import QuantizedModel, read_quantized
from train.quantized.tensors import Entry, write_bytes, write_tensors

BILLION = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
_VERB = "import sys; from train.cli import main; sys.exit(main(sys.argv[1:]))"
_NOTHING = "import train.ptq.quantize, lowbit.bf16"


def measured(program: str, *arguments: str) -> tuple[float, float, float]:
    """CPU seconds, seconds on the clock, and GB that the largest process so far held at most."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - began, after.ru_maxrss * 1024 / 1e9


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


def expected_bytes(model: QuantizedModel, bits: float) -> float:
    """Of codes and scales, and of all that stays in BF16: what the file's size is divided by."""
    values = sum(layer.weight.codes.numel() for layer in model.layers.values())
    return bits / 8 * values + 2 * sum(tensor.numel() for tensor in model.stay().values())


def memory(folder: Path) -> None:
    """Rounding; before the others, since a peak is that of all processes so far."""
    (folder / "1b").mkdir()
    random_billion(folder / "1b")
    _, _, idle = measured(_NOTHING)
    flags = ("--format", "mxfp4", "--method", "rtn", "--observer", "minmax")
    cpu, _, held = measured(_VERB, "quantize", str(folder / "1b"), str(folder / "out"), *flags)
    assert held > idle
    print(f"RTN of 1.2 B weights: {held - idle:.2f} GB above {idle:.2f}; CPU {cpu:.0f} s")


def main() -> None:
    """What was asked for, in the order in which peaks rise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["memory", "gptq", "export"])
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        if "memory" in args.what:
            memory(folder)
        method = ["gptq", "--transform", "hadamard"] if "gptq" in args.what else ["rtn"]
        quantized, exported = folder / "135m", folder / "exported"
        flags = ["--format", "mxfp4", "--cache", str(args.cache), "--method", *method]
        cpu, clock, _ = measured(_VERB, "quantize", "smollm2", str(quantized), *flags)
        load = f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads"
        print(f"{method[0]} of 135 M weights, 8,192 tokens: CPU {cpu:.0f} s, {clock:.0f} s, {load}")
        if "export" in args.what:
            layout = ("--layout", "compressed-tensors")
            cpu, clock, _ = measured(_VERB, "export", str(quantized), str(exported), *layout)
            bits = 4 + 8 / int(str(block_format("mxfp4").block_size))
            wanted = expected_bytes(read_quantized(quantized), bits)
            size = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
            print(f"export: CPU {cpu:.0f} s, {clock:.0f} s; {size:,} bytes, {size / wanted:.4f}")


if __name__ == "__main__":
    main()
