"""MODEL of `lowbit eval`: what `lowbit quantize` left and exports as well, as they compute."""

from pathlib import Path

import torch

from data.pretrained import load_vocabulary
from data.vocabulary import Vocabulary
from train.export.folder import read_mark
from train.export.reload import reload
from train.quantized.layout import is_ours
from train.quantized.model import read_quantized
from train.quantized.module import as_module
from train.subjects.models import Subject, check_finite, load_subject


def load_judged(name: str, cache: Path) -> Subject:
    """The model called `name`, in FP32; of an export the weights that its reader decodes."""
    subject = _exported(Path(name))
    if subject is None:
        return load_subject(name, cache)
    check_finite(subject.model, subject.source)
    return subject


def _exported(folder: Path) -> Subject | None:
    """None for a model of another kind."""
    if is_ours(folder):
        stored = read_quantized(folder)
        model, source = as_module(stored, torch.float32, exported=False), f"{folder} (lowbit)"
        return Subject(model, _vocabulary(folder), source, method=stored.method)
    if (mark := read_mark(folder)) is not None:
        read = reload(folder, torch.bfloat16)
        source = f"{folder} ({mark['layout']}, read by {read.reader})"
        model = read.model.to(torch.float32)
        return Subject(model, _vocabulary(folder), source, method=mark.get("method") or {})
    return None


def _vocabulary(folder: Path) -> Vocabulary | None:
    try:
        return load_vocabulary(str(folder))
    except ValueError:
        return None
