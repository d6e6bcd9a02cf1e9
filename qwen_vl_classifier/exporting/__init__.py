"""The same probabilities in other engines: a saved classifier becomes a folder that such an engine loads."""
