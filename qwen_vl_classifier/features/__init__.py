"""Features: hidden states that were read once and are kept."""
