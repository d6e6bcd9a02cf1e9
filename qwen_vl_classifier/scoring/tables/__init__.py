"""Predictions as further columns of a user's own table."""
