"""Answers of people: their journal on disk, what they add up to, and the data set that is made of them."""
