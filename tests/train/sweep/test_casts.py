"""The cast gap and its KL: equal to plain transformers with an FP32 head, and to `lowbit eval`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowbit import fake_quantize
from train.cli import main
from train.config.strict_yaml import load_yaml
from train.runs.casts import CastGap, read_cast_gaps, write_cast_gaps
from train.sweep.casts import _validation_windows, cast_gaps

Fit = Callable[..., int]
FORMATS = ("mxint8", "mxfp8")


def test_cast_gap(fit: Fit, tmp_path: Path) -> None:
    """The baseline against itself is exactly zero; coarser elements cost more."""
    for recipe in ("bf16", "mxint8", "mxfp8"):
        fit(tmp_path / recipe, recipe, "--checkpoint_every", "3")
    gaps = cast_gaps(tmp_path / "bf16", [tmp_path / r for r in ("bf16", "mxint8", "mxfp8")])
    assert gaps["bf16"].mean == gaps["bf16"].standard_error == 0
    assert 0 < abs(gaps["mxint8"].mean) < 0.02
    assert gaps["mxint8"].standard_error < gaps["mxfp8"].standard_error
    assert gaps["mxfp8"].tokens == gaps["mxfp8"].windows * 32
    assert gaps["bf16"].kl == 0 < gaps["mxint8"].kl < gaps["mxfp8"].kl < 0.01  # type: ignore[operator]
    along = gaps["mxfp8"].along
    assert [point["tokens_seen"] for point in along] == [3 * 8 * 32, 6 * 8 * 32]
    assert along[-1]["mean"] == gaps["mxfp8"].mean != along[0]["mean"]
    write_cast_gaps(tmp_path / "bf16", gaps)
    assert read_cast_gaps(tmp_path / "bf16")["mxfp8"].kl == gaps["mxfp8"].kl
    floor = gaps["mxfp8"].kl_floor
    assert floor is not None and 0 < floor < gaps["mxint8"].kl / 3  # type: ignore[operator]
    _equal_plain_transformers(tmp_path, gaps)


def _equal_plain_transformers(folder: Path, gaps: dict[str, CastGap]) -> None:
    """KL and floor, and what `lowbit eval` says of the same weights and windows, to 1 % or to a
    tenth of the floor, which is what BF16's own rounding alone makes: sums of batches of another
    size round differently on some machines.
    """
    floor = gaps["mxfp8"].kl_floor
    assert floor is not None
    windows = _validation_windows(load_yaml((folder / "bf16" / "config.yaml").read_text()))
    batch = windows.batch(np.arange(gaps["bf16"].windows), 0)
    seen = {
        name: plain_log_probabilities(folder / "bf16/hf", batch, name)
        for name in ("bf16", *FORMATS)
    }
    p = seen["bf16"]
    for name in FORMATS:
        expected = (p.exp() * (p - seen[name])).sum(-1).mean().item()
        assert gaps[name].kl == pytest.approx(expected, rel=0.01, abs=floor / 10)
    arguments = [str(folder / "bf16"), "--windows", str(gaps["bf16"].windows)]
    assert main(["eval", *arguments, "--formats", *FORMATS, "--out", str(folder / "eval")]) == 0
    rows = {
        row["format"]: row
        for row in json.loads((folder / "eval" / "eval.json").read_text())["rows"]
    }
    for name in FORMATS:
        assert rows[name]["KL"] == pytest.approx(gaps[name].kl, rel=0.01, abs=floor / 10)
        assert rows[name]["loss gap"] == pytest.approx(gaps[name].mean, abs=1e-6)


@torch.no_grad()
def plain_log_probabilities(hf: Path, batch: dict[str, Tensor], name: str) -> Tensor:
    """Float64, of transformers' own model: its linear layers on rounded operands, its head FP32."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear) and name != "bf16":

            def forward(x: Tensor, layer: nn.Linear = layer) -> Tensor:
                operands = (x.bfloat16(), layer.weight.bfloat16())
                return F.linear(*(fake_quantize(operand, name) for operand in operands))

            layer.forward = forward  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    logits: Tensor = hidden.double() @ model.lm_head.weight.double().T
    return logits.log_softmax(-1)
