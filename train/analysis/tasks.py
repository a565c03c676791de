"""Tasks of the LM evaluation harness under each format, where that package is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from data.vocabulary import Vocabulary
from lowbit import QuantLinear, QuantRecipe

PACKAGE = "lm_eval"


def check_installed() -> None:
    """ValueError without the package: nothing else here needs it."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError("--tasks needs the LM evaluation harness: pip install lm_eval")


def task_rows(
    model: nn.Module,
    vocabulary: Vocabulary,
    recipes: Mapping[str, QuantRecipe],
    tasks: Sequence[str],
    num_fewshot: int | None,
) -> list[dict[str, Any]]:
    """One row a format and task: its metrics as the harness names them, with standard errors."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    eos = vocabulary.tokenizer.id_to_token(vocabulary.eos_id)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers'
        tokenizer_object=vocabulary.tokenizer, eos_token=eos
    )
    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    rows = []
    for name, recipe in recipes.items():
        for layer in layers:
            layer.set_recipe(recipe)
        found = lm_eval.simple_evaluate(
            model=subject, tasks=[*tasks], num_fewshot=num_fewshot, log_samples=False
        )
        for task, metrics in found["results"].items():
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            rows.append({"format": name, "task": task, **numbers})
    return rows
