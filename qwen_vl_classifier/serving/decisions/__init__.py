"""Typed questions about a state: what they mean, what they are asked of, and how answers follow from probabilities."""
