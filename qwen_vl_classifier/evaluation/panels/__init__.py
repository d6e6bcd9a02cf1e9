"""Evaluate several labels at once: figures of each label, means over all, and the confusion of classes."""
