"""hf/: the run as a folder that transformers, and whoever reads its files, load and serve."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig

from data.durable import sync_folder
from data.module import TokenDataModule
from train.fit.model_card import model_card
from train.fit.record import RunRecord
from train.model.initial import empty_model


@dataclass(frozen=True)
class Export:
    """Where, and of which model and corpus."""

    run_dir: Path
    config: LlamaConfig
    data: TokenDataModule

    def write(self, weights: dict[str, Tensor], record: RunRecord) -> str:
        """Weights, configuration, tokenizer, model card, signature: all of them or none. Returns
        the signature's SHA-256.
        """
        folder, staging = self.run_dir / "hf", self.run_dir / "hf.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        config = copy.deepcopy(self.config)
        config.use_cache = True
        empty_model(config).save_pretrained(staging, state_dict=weights)
        _write(staging / "config.json", self._config(staging / "config.json"))
        _write(staging / "generation_config.json", self._ends)
        tokenizer = _plain_tokenizer(self.data.path / self.data.manifest.tokenizer_file)
        (staging / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        _write(staging / "tokenizer_config.json", self._tokenizer_config(tokenizer))
        (staging / "README.md").write_text(model_card(self.run_dir), encoding="utf-8")
        signature = record.sign(staging)
        _settle(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        sync_folder(self.run_dir)
        return signature

    @property
    def _eos(self) -> int:
        return self.data.manifest.eos_id

    @property
    def _ends(self) -> dict[str, Any]:
        """Documents end with one id, after which the next begins: the only one there is."""
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), self._eos)

    def _config(self, written: Path) -> dict[str, Any]:
        """With what readers from before transformers 5 look for as well.

        Without a padding id, for which the embedding would have a row without a gradient.
        """
        plain: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
        rope = dict(plain["rope_parameters"])
        plain |= self._ends | {"pad_token_id": None, "use_cache": True}
        plain |= {"torch_dtype": plain["dtype"], "rope_theta": rope.pop("rope_theta")}
        return plain | {"rope_scaling": None if rope == {"rope_type": "default"} else rope}

    def _tokenizer_config(self, tokenizer: str) -> dict[str, Any]:
        end = Tokenizer.from_str(tokenizer).id_to_token(self._eos)
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
            "model_max_length": self.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }


def _plain_tokenizer(path: Path) -> str:
    """As `lowbit prepare` used it: nothing put around a text, nothing cut off or filled up."""
    text = path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    adds = tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids
    plain = json.loads(text)
    if not adds and plain.get("truncation") is None and plain.get("padding") is None:
        return text
    plain |= {"truncation": None, "padding": None}
    return json.dumps(plain | ({"post_processor": None} if adds else {}), ensure_ascii=False)


def _write(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _settle(folder: Path) -> None:
    """On disk, and each file as readable as any that a program makes: safetensors' are private."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode & 0o777)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
