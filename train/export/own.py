"""Our own layout, as `lowbit quantize` leaves it: every format, nothing lost."""

from train.export.model import Packed
from train.quantized.layout import DOCUMENT, FORMAT_VERSION
from train.quantized.model import QuantizedModel

NAME = "lowbit"
HOLDS = "every format, transform and format of activations"


def pack(model: QuantizedModel) -> Packed:
    """Codes a byte a value; the other tensors in their own dtype."""
    layers = {name: layer.describe() for name, layer in model.layers.items()}
    document = {"format_version": FORMAT_VERSION, "source": {"model": model.source}}
    return Packed(
        tensors=dict(model.others),
        notes=("read by: lowbit",),
        documents={DOCUMENT: document | {"method": dict(model.method), "layers": layers}},
        entries=tuple(e for name, layer in model.layers.items() for e in layer.entries(name)),
    )
