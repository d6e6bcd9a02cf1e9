"""Serve classifiers over HTTP: batch requests, and handle overload, deadlines and shutdown.

A request comes in by `http` (connections, who may call, bodies), passes `observability` and `admission`, and reaches a
module of `routes`. It becomes `items`, which `service` classifies: pictures are read (`media`) and decoded (`decoder`),
prepared for the model (`preparing`) and scored in passes that many requests share (`batcher`, `worker`, `panels`).
`app` puts all of it together, `http.server` runs it as a process.
"""
