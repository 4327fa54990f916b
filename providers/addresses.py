"""Which addresses are the public Internet's."""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IPv6 ranges that carry an IPv4 address in their last 32 bits (RFC 6052, RFC 4291).
CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))


def parse(text: str) -> Address:
    """The address; of one that only wraps an IPv4 address, that one. Raises ValueError."""
    found = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return found
    inner = found.ipv4_mapped or found.sixtofour
    if inner is None and any(found in network for network in CARRIERS) and int(found) > 0xFFFF:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return inner or found


def is_public(text: str) -> bool:
    """Whether the address is one of the public Internet: not of this machine, a private, shared,
    link-local or reserved network, and no multicast. What can't be read is not."""
    try:
        found = parse(text)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.is_site_local:
        return False
    return found.is_global and not (
        found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback
    )
