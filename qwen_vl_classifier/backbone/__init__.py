"""Examples in, pooled hidden states out: loading, prompts, packing and the pass through the model."""
