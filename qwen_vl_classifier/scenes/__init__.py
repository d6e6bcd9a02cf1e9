"""Synthetic pictures and statements about them: the demo's data set, and test data."""
