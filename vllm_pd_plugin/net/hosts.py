"""What a host is, as text; no name is looked up."""

from __future__ import annotations

import ipaddress
import re

_LABEL = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z_-]{0,61}[0-9A-Za-z])?")
_MAX_LENGTH = 253


def is_host(text: str) -> bool:
    """Say whether a text is an IP address, or can be the name of a host (RFC 1123, and underscores
    inside of a label, as container names have them)."""
    if _is_ip(text):
        return True
    labels = text.removesuffix(".").split(".")
    # A name whose last label is a number is taken for an IPv4 address by resolvers, in forms of
    # their own ("127.1", "2130706433").
    if not 0 < len(text) <= _MAX_LENGTH or labels[-1].isdigit():
        return False
    return all(_LABEL.fullmatch(label) for label in labels)


def is_loopback(host: str) -> bool:
    """Say whether ``host`` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Say whether ``host`` stands for every address of this machine."""
    try:
        return host == "*" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def in_url(host: str) -> str:
    """Return a host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _is_ip(text: str) -> bool:
    if "%" in text:  # a zone, which means something on one machine only
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
