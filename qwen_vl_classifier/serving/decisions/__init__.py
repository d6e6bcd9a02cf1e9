"""Typed questions about a state: their meaning, which model answers them, and how answers follow from probabilities."""
