"""Which network addresses a scraper may talk to: public ones only, in whatever notation they come."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Azure's host service answers on a public address.
_PUBLIC_BUT_INTERNAL = frozenset({ipaddress.ip_address("168.63.129.16")})
_GLOBAL_UNICAST_6 = ipaddress.ip_network("2000::/3")
# Addresses that carry an IPv4 address a relay would reach.
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


class Refused(Exception):
    """The scraper will not fetch this; says what and why."""


def vet(address: str, allowed: Sequence[Network] = ()) -> Address:
    """The parsed address if it is public (or in `allowed`). Raises `Refused`."""
    try:
        parsed: Address = ipaddress.ip_address(address)
    except ValueError:
        raise Refused(f"{address!r} is not an IP address") from None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if any(parsed in network for network in allowed):
        return parsed
    if not _is_public(parsed):
        raise Refused(f"address {address} is not public")
    return parsed


def _is_public(address: Address) -> bool:
    if address.is_multicast or not address.is_global or address in _PUBLIC_BUT_INTERNAL:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        return address in _GLOBAL_UNICAST_6 and address not in _SIX_TO_FOUR
    return True
