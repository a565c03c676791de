"""The model in training: the Lightning module and what it is made of."""
