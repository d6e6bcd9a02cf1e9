"""Classifiers behind HTTP: requests become batches, and overload, deadlines and shutdown have an answer.

`batcher` gathers items of many requests into passes and knows neither HTTP nor torch; `media` turns what a
request holds for a picture into the bytes of an image file; `schemas` says what requests and answers look like;
`app` puts them together.
"""
