"""Learning: heads on kept features, and the whole model."""
