"""The `lowbit` command: verbs, one line for every user's error, exit codes."""

import argparse
import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable

from train.output.console import leave_torchao_out
from train.output.lasting import lasting_streams
from train.output.mistakes import UNION, shortened
from train.output.tables import printable
from train.runs.outcome import NonFiniteError

VERBS = {
    "fit": "train one run, or go on with it",
    "validate": "validation loss of a checkpoint",
    "plan": "memory, FLOPs and days of a run, before it starts",
    "prepare": "text -> packed token shards",
    "sweep": "the same run under several recipes and seeds",
    "compare": "run folders -> gap table, picture, report",
    "formats": "the table of block formats",
    "analyze": "QSNR and crest factors of a model's operands",
    "eval": "perplexity and KL of a trained model cast into formats",
    "quantize": "post-training quantization: rounding or GPTQ, scales by search, transforms",
    "export": "a quantized model as files that other engines load",
    "theory": "QSNR against crest factor, in theory and on random numbers",
    "search": "the best formats of so many bits a value, for a model or a distribution",
    "reproduce": "the study's published results against measured ones",
    "audit": "this project's checks, for anybody's quantizer",
}
_CONFIGURED = {"fit": "train.fit.fit", "validate": "train.fit.fit", "plan": "train.plan.plan"}
MODULES = {
    "prepare": "data.prepare",
    "sweep": "train.sweep.sweep",
    "compare": "train.compare.compare",
    "formats": "train.analysis.formats_table",
    "analyze": "train.analysis.analyze",
    "eval": "train.analysis.evaluate",
    "quantize": "train.ptq.quantize",
    "export": "train.export.export",
    "theory": "train.analysis.theory",
    "search": "train.analysis.search",
    "reproduce": "train.reproduce.reproduce",
    "audit": "train.audit.audit",
}
# they multiply nothing in this process; sweep enters lowbit.bf16.everywhere where it does
WITHOUT_PRODUCTS = {"plan", "prepare", "sweep", "compare", "formats", "theory"}
EXIT_CODES = (
    "exit codes: 0 done, 1 a bound of compare exceeded or a check of audit failed, 2 bad input, "
    "3 not finite; 129, 130, 138, 143, 152: stopped by SIGHUP, SIGINT, SIGUSR1, SIGTERM, SIGXCPU "
    "with a checkpoint saved"
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; heavy imports happen inside it."""
    if argv is None:  # a process of its own, not a program that calls us
        leave_torchao_out()
        argv = sys.argv[1:]
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if argv == ["--version"]:
        return _version()
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        close = difflib.get_close_matches(argv[0], VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(VERBS)}"
        print(f"lowbit: error: there is no verb {argv[0][:40]!r}; {hint}", file=sys.stderr)
        return 2
    if argv and argv[0] in _CONFIGURED:
        module = _CONFIGURED[argv[0]]
        verb = argv[0]
        return _guarded(verb, lambda: getattr(importlib.import_module(module), verb)(argv[1:]))
    parser = argparse.ArgumentParser(
        prog="lowbit",
        description="Pretrain Llama models in low-bit block formats, and compare with BF16.",
        epilog=EXIT_CODES,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary)
        if verb in MODULES and argv[:1] == [verb]:
            importlib.import_module(MODULES[verb]).add_arguments(subparser)
    args = parser.parse_args(argv)
    return _guarded(args.verb, lambda: importlib.import_module(MODULES[args.verb]).run(args))


def _version() -> int:
    """Of the package, torch and the devices, and how BF16 products are computed on this CPU."""
    torch, bf16 = importlib.import_module("torch"), importlib.import_module("lowbit.bf16")
    print(f"lowbit {importlib.metadata.version('lowbit')}")
    print(f"torch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}")
    print(f"BF16 products on this CPU: {bf16.products('cpu')}")
    gpus = torch.cuda.device_count()
    print(f"GPUs: {', '.join(torch.cuda.get_device_name(i) for i in range(gpus)) or 'none'}")
    return 0


def _guarded(verb: str, run: Callable[[], int]) -> int:
    """The verb's exit code, whoever reads what it prints."""
    with lasting_streams():
        return _answered(verb, run)


def _answered(verb: str, run: Callable[[], int]) -> int:
    """A user's error becomes one line on stderr and code 2."""
    try:
        if verb in WITHOUT_PRODUCTS:
            return run()
        with importlib.import_module("lowbit.bf16").everywhere():
            return run()
    except KeyboardInterrupt:
        print("lowbit: stopped", file=sys.stderr)
        return 130
    except argparse.ArgumentError as error:
        print(f"lowbit: error: {shortened(str(error))}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        text = shortened(str(error)) if UNION in str(error) else str(error)
        print(f"lowbit: error: {printable(text)}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"lowbit: not finite: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
