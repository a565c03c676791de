"""What a step needs at most, by the C library's count: a witness for `lowbit plan`. Linux alone."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from train.model.module import PretrainModule


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2; its bytes in use are `uordblks` and, mapped, `hblkhd`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]  # ctypes reads it


class MallocPeak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Most bytes that malloc had given out, of any thread, as an operator returned; from now on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._mallinfo = ctypes.CDLL(None).mallinfo2
        self._mallinfo.restype = MallocInfo
        self.before = self.peak = self._used()

    def _used(self) -> int:
        info = self._mallinfo()
        return int(info.uordblks + info.hblkhd)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.peak = max(self.peak, self._used())
        return result


def measure_memory(file: Path) -> Callable[[PretrainModule], None]:
    """Write down what this step needs beyond what was there when it began."""

    def act(module: PretrainModule) -> None:
        mode = MallocPeak()
        mode.__enter__()

        def end(*args: Any) -> None:
            mode.__exit__(None, None, None)
            file.write_text(str(mode.peak - mode.before))

        module.on_train_batch_end = end  # type: ignore[assignment]  # of this object

    return act
