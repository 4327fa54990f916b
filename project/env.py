"""Settings from the environment: typed, with a default and one line of explanation each.

Every name that was asked for stands in `KNOWN`, from which the docs are checked. A value that
can't be read raises `ImproperlyConfigured` with the name in its message.
"""

import os
import sys
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

from django.core.exceptions import ImproperlyConfigured


@dataclass(frozen=True)
class Setting:
    name: str
    default: str
    about: str


KNOWN: dict[str, Setting] = {}


def text(name: str, default: str, about: str) -> str:
    KNOWN[name] = Setting(name, default, about)
    return os.environ.get(name, "").strip() or default


def boolean(name: str, default: bool, about: str) -> bool:
    value = text(name, "1" if default else "0", about).lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    raise ImproperlyConfigured(f"{name} is {value!r}: give 1 or 0")


def integer(name: str, default: int, about: str, *, least: int = 0) -> int:
    return int(number(name, default, about, least=least, kind=int))


def seconds(name: str, default: float, about: str, *, least: float = 0.0) -> float:
    return number(name, default, about, least=least, kind=float)


def number(
    name: str,
    default: float,
    about: str,
    *,
    least: float,
    most: float = sys.float_info.max,
    kind: type[int] | type[float],
) -> float:
    value = text(name, str(default), about)
    try:
        parsed = kind(value)
    except ValueError:
        raise ImproperlyConfigured(f"{name} is {value!r}: give a number") from None
    if not least <= parsed <= most:
        limit = f"{least} or more" if most == sys.float_info.max else f"{least} to {most}"
        raise ImproperlyConfigured(f"{name} is {value}: give {limit}")
    return parsed


def choice(name: str, default: str, about: str, *, among: tuple[str, ...]) -> str:
    value = text(name, default, about)
    if value not in among:
        raise ImproperlyConfigured(f"{name} is {value!r}: give {' or '.join(among)}")
    return value


def networks(name: str, default: str, about: str) -> list[IPv4Network | IPv6Network]:
    try:
        return [ip_network(item) for item in csv(name, default, about)]
    except ValueError as error:
        raise ImproperlyConfigured(f"{name}: {error}; give networks like 10.1.0.0/16") from None


def csv(name: str, default: str, about: str) -> list[str]:
    return [item.strip() for item in text(name, default, about).split(",") if item.strip()]
