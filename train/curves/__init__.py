"""Loss curves of other trainers, read as runs that know little of themselves."""
