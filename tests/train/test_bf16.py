"""A run multiplies all its BF16 matrices in one way, which it remembers."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import QuantRecipe, bf16, convert_linears
from train.analysis.scores import evaluate
from train.cli import main
from train.compare.branches import read_branches
from train.distributed import ranks as ranks_of
from train.model.module import token_losses
from train.subjects.text import Text
from train.sweep.casts import cast_gaps

Fit = Callable[..., int]
WAYS = ("native", "fp32")
OTHER = {"native": "fp32", "fp32": "native"}
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


def stop(module: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("way", WAYS)
def test_resume_is_bitwise_and_in_the_same_way(
    way: str,
    fit: Fit,
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with bf16.using(way):
        assert fit(whole, "mxint8") == 0
        on_micro_batch(2, stop)
        assert fit(parts, "mxint8") == 143
    on_micro_batch(-1, stop)
    assert json.loads((parts / "run.json").read_text())["bf16_products"] == way
    before = sorted(parts.rglob("*")), (parts / "metrics.csv").read_bytes()
    point = parts / "checkpoints" / "step-00000003"
    with bf16.using(OTHER[way]):
        for resume in ("auto", str(point)):
            capsys.readouterr()
            assert fit(parts, "mxint8", "--resume", resume) == 2
            error = capsys.readouterr().err
            assert len(error.splitlines()) == 1 and f"LOWBIT_BF16={way}" in error
    assert (sorted(parts.rglob("*")), (parts / "metrics.csv").read_bytes()) == before
    with bf16.using(way):
        assert fit(parts, "mxint8") == 0
    assert_same_run(parts, whole)


def test_a_checkpoint_from_before_there_was_a_choice_is_native(
    fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.fit.saving as saving

    now = saving.run_origin
    with monkeypatch.context() as patch:
        patch.setattr(
            saving, "run_origin",
            lambda *a: {k: v for k, v in now(*a).items() if k != "bf16_products"},
        )  # fmt: skip
        on_micro_batch(2, stop)
        with bf16.using("native"):
            assert fit(tmp_path / "run", "bf16") == 143
    on_micro_batch(-1, stop)
    with bf16.using("fp32"):
        assert fit(tmp_path / "run", "bf16") == 2
    with bf16.using("native"):
        assert fit(tmp_path / "run", "bf16") == 0


def test_ranks_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has a unit, the other none: gathered as torch.distributed gathers."""

    def gather(found: list[Any], own: Any) -> None:
        found[:] = ["native", "fp32"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"native, fp32, by rank.*LOWBIT_BF16"):
        ranks_of.products_of_all("cpu")


def test_a_typo_ends_every_verb_before_it_begins(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_BF16", "fp23")
    monkeypatch.setattr(bf16, "_stands", False)  # the suite's own may be there already
    bf16._chosen.cache_clear()
    recipe = str(Path(__file__).parents[2] / "configs" / "recipe" / "bf16.yaml")
    verbs: list[Callable[[], int]] = [
        lambda: fit(tmp_path / "run", "bf16"),
        lambda: main(["eval", "smollm2", "--formats", "mxint8"]),
        lambda: main(["sweep", "--out", str(tmp_path / "sweep"), "--recipes", recipe]),
    ]
    try:
        for verb in verbs:
            assert verb() == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "'fp23', expected one of ('auto'" in error
    finally:
        bf16._chosen.cache_clear()
    assert not any(tmp_path.iterdir())


# --- every product --------------------------------------------------------------------------------


@pytest.fixture
def no_native_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels, where ours come before them, are never given a BF16 matrix."""
    original = bf16._torchs

    def guarded(name: str) -> Callable[..., Any]:
        call = original(name)

        def checked(keys: Any, *arguments: Any, **more: Any) -> Any:
            for x in (*arguments, *more.values()):
                assert not isinstance(x, Tensor) or x.dtype is not torch.bfloat16, name
            return call(keys, *arguments, **more)

        return checked

    monkeypatch.setattr(bf16, "_torchs", guarded)
    monkeypatch.setattr(bf16, "_stands", False)  # the suite's own may be there already


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """The operators that multiply BF16 matrices, as PyTorch's own count of FLOPs knows them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if (
            any(x.dtype is torch.bfloat16 for x in tensors)
            and func._overloadpacket in flop_registry
        ):
            name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
            self.names.add(name if overload == "default" else f"{name}.{overload}")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recipe", [QuantRecipe(), QuantRecipe.uniform("mxfp8")])
def test_a_step_calls_no_product_that_has_no_kernel_of_ours(
    attention: str, dropout: float, recipe: QuantRecipe, no_native_product: None
) -> None:
    config = LlamaConfig(**SHAPE, attention_dropout=dropout, attn_implementation=attention)
    model = convert_linears(LlamaForCausalLM(config), recipe, skip=("lm_head",))
    ids = torch.randint(0, 96, (2, 33))
    with bf16.using("fp32"), bf16.everywhere():
        covered = set(bf16._kernels())
        with Products() as seen, torch.autocast("cpu", torch.bfloat16):
            token_losses(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}).mean().backward()
    assert "mm" in seen.names and seen.names <= covered


@pytest.mark.parametrize("recipe", ["bf16", "mxint8"])
def test_a_run_its_validation_and_its_cast_use_no_native_product(
    recipe: str, fit: Fit, tmp_path: Path, no_native_product: None
) -> None:
    with bf16.using("fp32"):
        assert fit(tmp_path / recipe, recipe, "--trainer.max_steps", "3") == 0
        if recipe == "bf16":
            shutil.copytree(tmp_path / "bf16", tmp_path / "again")
            assert cast_gaps(tmp_path / "bf16", [tmp_path / "again"]) is not None


@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_operands_is_bitwise_the_plain_one(way: str) -> None:
    """Loss and every gradient; the witness is transformers' model, never converted."""
    ids = torch.randint(0, 96, (2, 33))
    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
        if convert:
            convert_linears(model, QuantRecipe())
        with bf16.using(way), bf16.everywhere():
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_losses(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}).mean()
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))


def test_eval_in_bf16_follows_too(no_native_product: None) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    ids = torch.randint(0, 96, (2, 33))
    text = Text(ids, "noise")
    recipes = {"bf16": QuantRecipe(), "mxint8": QuantRecipe.uniform("mxint8")}
    with bf16.using("fp32"), bf16.everywhere():
        found = evaluate(convert_linears(model, QuantRecipe(), ("lm_head",)), recipes, text)
    assert found["mxint8"].kl[0] > 0


def test_branches_go_on_in_their_own_way(
    fit: Fit, tmp_path: Path, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bf16.using("native"):
        settings = ("--model.llama.attention_dropout", "0", "--checkpoint_every", "3")
        assert fit(tmp_path / "run", "bf16", *settings) == 0
    arguments = [
        *("sweep", "--branch-from", str(tmp_path / "run" / "checkpoints" / "step-00000003")),
        *("--horizon", "1", "--out", str(tmp_path / "out"), "--branches"),
    ]
    arms = ["--recipes", str(recipes / "bf16.yaml"), str(recipes / "mxfp8.yaml")]
    with bf16.using("fp32"):
        assert main([*arguments, "1", *arms]) == 0
    found = read_branches(tmp_path / "out")
    assert found is not None and found.origin["bf16_products"] == "fp32"
    with bf16.using("native"):
        assert main([*arguments, "2", *arms]) == 2
    assert "LOWBIT_BF16=fp32" in capsys.readouterr().err
