"""Features in, calibrated probabilities out; and the folder in which a classifier is saved."""
