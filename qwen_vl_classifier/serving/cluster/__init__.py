"""The service on Ray Serve: replicas on the GPUs of one machine or of a cluster."""
