"""Scoring: probabilities for data sets of any size, written in shards that a killed run does not lose."""
