"""Evaluate classifiers: metrics, intervals, checks, comparisons and explanations."""
