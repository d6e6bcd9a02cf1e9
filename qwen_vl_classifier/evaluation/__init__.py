"""How good a classifier is, and what it looked at."""
