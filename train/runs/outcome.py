"""How a run may end: the statuses of run.json, and the exceptions that stand for two of them."""

STATUSES = ("running", "finished", "diverged", "failed")


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not a finite number; raised before the optimizer step."""
