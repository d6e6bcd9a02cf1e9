"""HTTP: connections, who may call, bodies within limits, errors as answers, and the process that listens."""
