"""Labelling over HTTP: one page and what it asks for, for this machine alone."""
