"""What scores: classifiers and panels of labels, and the columns that each of them fills."""
