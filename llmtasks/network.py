"""Where tools, MCP servers and webhooks may lead: the public Internet, and what PRIVATE_NETWORKS
names. Vendors' accounts are not asked: operators point them wherever they like."""

from django.conf import settings

from providers import addresses


def may_reach(address: str) -> bool:
    """Whether a connection to that address may be made."""
    if addresses.is_public(address):
        return True
    try:
        found = addresses.parse(address)
    except ValueError:
        return False
    return any(found in network for network in settings.PRIVATE_NETWORKS)
