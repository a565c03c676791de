"""The configuration and the tokens of a run of seconds with all that could go wrong."""

from pathlib import Path

from data.prepare import prepare
from data.request import PrepareRequest

STOCHASTIC = "{name: mxint8, rounding: stochastic}"
CONFIG = f"""
model:
  llama: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}}
  optimization: {{lr: 1.0e-2, warmup_steps: 2}}
  policy:
    name: stochastic
    recipe: {{fprop_input: mxint8, fprop_weight: mxint8, dgrad_weight: mxint8, wgrad_input: mxint8,
      dgrad_grad_output: {STOCHASTIC}, wgrad_grad_output: {STOCHASTIC}}}
data: {{seq_len: 32, global_batch_size: 8, val_windows: 8}}
trainer: {{accelerator: cpu, accumulate_grad_batches: 2, val_check_interval: 3}}
checkpoint_every: 1
collective_timeout: 60
"""


def write_texts(folder: Path) -> str:
    """A text that needs no download; the glob of its files."""
    folder.mkdir()
    for index in range(20):
        lines = (f"{index} times {n} is {index * n}, as every child knows." for n in range(40))
        (folder / f"{index}.txt").write_text("\n".join(lines))
    return f"{folder}/*.txt"


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Tokens and configuration."""
    text = write_texts(folder / "text")
    prepare(folder / "tokens", PrepareRequest(text=(text,), tokenizer="bytes", val_fraction=0.2))
    (folder / "config.yaml").write_text(CONFIG)
    return folder / "tokens", folder / "config.yaml"
