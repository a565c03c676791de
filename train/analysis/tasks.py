"""Tasks of the LM evaluation harness under each format, where that package is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Tasks:
    """What the harness is asked for."""

    names: Sequence[str]
    num_fewshot: int | None = None  #: None: each task's own
    path: Path | None = None  #: a folder of task YAML that is looked at first

    def check(self) -> None:
        """ValueError for a folder without tasks, and for names that are known nowhere."""
        if self.path is not None and not any(self.path.rglob("*.yaml")):
            raise ValueError(f"--task-path {self.path}: no folder with task YAML in it")
        known = self.manager().all_tasks
        if unknown := [name for name in self.names if name not in known and "*" not in name]:
            raise ValueError(f"--tasks {unknown[0]}: known neither to the harness nor to a YAML")

    def manager(self) -> Any:
        """The harness's index of tasks."""
        from lm_eval.tasks import TaskManager

        own = None if self.path is None else str(self.path)
        return TaskManager(include_path=own, verbosity="ERROR")


def task_rows(
    model: nn.Module, vocabulary: Vocabulary, recipes: Mapping[str, QuantRecipe], tasks: Tasks
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
            model=subject, tasks=[*tasks.names], num_fewshot=tasks.num_fewshot,
            task_manager=tasks.manager(), log_samples=False,
        )  # fmt: skip
        for task, metrics in found["results"].items():
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            rows.append({"format": name, "task": task, **numbers})
    return rows
