"""`lowbit fit` and `lowbit validate`: one run, from its configuration to its last weights."""
