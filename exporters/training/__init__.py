"""Training of the demo checkpoints."""
