"""From no labels to a classifier: which row to ask next, answers kept on disk, and the labelling page."""
