"""Classifiers behind HTTP: requests become batches, and overload, deadlines and shutdown have an answer.

A request passes the layers of `observing` and `access`, gets its place in `admission`, is read by a module of `routes`
in the shapes of `schemas`, and becomes the `items` that a `service` is asked. That reads pictures (`media`, `decoder`),
prepares them (`preparing`) and has them scored in passes that many requests share (`batcher`, `groups`). `app` puts all
of it together, `server` runs it as a process.
"""
