"""Take the address on which a server listens."""

from __future__ import annotations

import os
import socket

from qwen_vl_classifier.errors import ConfigError


def listening(host: str, port: int) -> socket.socket:
    """Bind the address, so that one which is not free is an error of one line.

    Raises:
        ConfigError: It cannot be taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        # The text of an error number of the system, without what `create_server` adds; names have numbers of their own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(
            f"host {host!r}, port {port}: cannot listen there ({reason}); give an address of this machine and a port "
            "that is free"
        ) from None
