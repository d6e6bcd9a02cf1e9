"""Training the backbone itself, by adapters or in full."""
