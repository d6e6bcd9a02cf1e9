"""Tell which IP addresses are hosts of the public internet; all others may lead into a private network.

The tables are our own: those of Python's `ipaddress` changed within releases of 3.11 and 3.12, and lack addresses
that lead inside although they look public, such as those of translators and of a cloud's own services.
"""

from __future__ import annotations

import ipaddress
from typing import Final

# IANA's special-purpose registry (RFC 6890) where not globally reachable, multicast and reserved; besides, the relay
# anycast of 6to4 (RFC 7526) and the address at which Azure answers its own machines.
_PRIVATE_V4: Final = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",
    )
)

# All public IPv6 addresses lie in here (RFC 4291). Outside are loopback, link-local, site-local, unique local
# and multicast addresses, and the forms that hold an IPv4 address: mapped, compatible and NAT64.
_PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")

# Protocol assignments with Teredo (RFC 4380) and benchmarking, documentation twice, 6to4 (RFC 3056).
_PRIVATE_V6: Final = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)


def is_public(address: str) -> bool:
    """Tell whether a text is an IP address of the public internet.

    Example:
        >>> is_public("93.184.216.34"), is_public("169.254.169.254"), is_public("::ffff:93.184.216.34")
        (True, False, False)
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _PRIVATE_V4)
    return parsed.scope_id is None and parsed in _PUBLIC_V6 and not any(parsed in network for network in _PRIVATE_V6)
