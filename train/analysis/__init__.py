"""What the formats do to tensors and models: verbs that look and change nothing."""
