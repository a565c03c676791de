"""`lowbit sweep`: the same run under several recipes and seeds; branches of checkpoints."""
