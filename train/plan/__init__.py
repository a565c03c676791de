"""`lowbit plan`: memory, FLOPs and days of a run before it starts."""
