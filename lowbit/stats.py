"""How well a quantized tensor stands for the original: pure functions."""

import torch
from torch import Tensor

from lowbit.blocks import to_blocks


def qsnr_db(x: Tensor, quantized: Tensor) -> Tensor:
    """Quantization signal-to-noise ratio -10 log10(|x - q|² / |x|²) in dB, over all elements."""
    x = x.double()
    noise = (x - quantized.double()).square().sum()
    return -10 * torch.log10(noise / x.square().sum())


def crest_factor(x: Tensor, block_size: int = 32, dim: int = -1) -> Tensor:
    """max |x| / RMS of each block along `dim` (zero fill counted in); NaN for zeros."""
    blocks, inside = to_blocks(x.double(), block_size, dim)
    return blocks.abs().amax(inside) / blocks.square().mean(inside).sqrt()
