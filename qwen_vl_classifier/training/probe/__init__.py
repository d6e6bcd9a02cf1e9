"""Heads on the features of a frozen backbone: what is tried, how it is compared, and what is chosen."""
