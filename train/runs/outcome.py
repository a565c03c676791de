"""How a run may end: the statuses of run.json, and the exceptions that stand for two of them."""

STATUSES = ("running", "finished", "diverged", "failed")


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a validation or what a step left is not a finite number."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step
