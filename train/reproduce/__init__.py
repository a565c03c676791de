"""`lowbit reproduce`: published results against measured ones."""
