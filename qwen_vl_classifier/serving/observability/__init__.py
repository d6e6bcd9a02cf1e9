"""Observability: an id for each request, the log and the metrics.

Nothing that a caller sent is in them: no text, picture, key, path or query. Requests are named by the template of their
route, and labels of metrics have few values, none of which a caller chooses.
"""
