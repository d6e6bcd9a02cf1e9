"""Finding, checking, reading and writing checkpoints in the hub's layout."""
