"""Several ranks: FSDP2, and meeting before they wait for each other."""
