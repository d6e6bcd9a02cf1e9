"""Features: hidden states that are read once and stored."""
