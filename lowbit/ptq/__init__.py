"""Post-training quantization as pure functions: scales chosen by search, codes by GPTQ."""

from lowbit.ptq.gptq import Order, Solved, Solver, gptq, shifted_target
from lowbit.ptq.observers import Observer, Search, observe

__all__ = ["Observer", "Order", "Search", "Solved", "Solver", "gptq", "observe", "shifted_target"]
