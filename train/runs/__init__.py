"""The run folder, the only currency: what a run was and what it did."""
