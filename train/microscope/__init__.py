"""What formats do to operands and gradients while a run trains."""
