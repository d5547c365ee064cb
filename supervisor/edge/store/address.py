"""Where a job's store is: ``tcp://host:port`` or ``etcd://host:port[,host:port…][/prefix]``."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from supervisor.errors import ConfigError

ALLOWED: Final = (
    "tcp://host:port or etcd://[user:password@]host:port[,host:port…][/prefix] (etcds:// with TLS)"
)
#: files for etcds://, named as etcdctl does
CA, KEY, CERTIFICATE = "ETCDCTL_CACERT", "ETCDCTL_KEY", "ETCDCTL_CERT"


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """A parsed URL. ``prefix`` is etcd's only, with slashes around it; empty where none was given."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    prefix: str = ""
    user: str | None = None
    password: str | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether one of the nodes serves it."""
        return self.scheme == "tcp"

    def __str__(self) -> str:
        """Without the password."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{hosts}{self.prefix.rstrip('/')}"


def parse(text: str) -> StoreAddress:
    """Raises ConfigError that says what is allowed."""
    scheme, separator, rest = text.strip().partition("://")
    if not separator or scheme not in ("tcp", "etcd", "etcds"):
        raise ConfigError(f"{text!r} is no store; allowed: {ALLOWED}")
    place, _, path = rest.partition("/")
    account, at, places = place.rpartition("@")
    if at and scheme == "tcp":
        raise ConfigError(f"{scheme}://…@{places}: a tcp store knows no users, only the job's secret")
    hosts = tuple(_host(one, text if not at else f"{scheme}://…@{places}") for one in places.split(","))
    if scheme == "tcp" and (len(hosts) > 1 or path):
        raise ConfigError(f"{text!r}: one host:port is required; allowed: {ALLOWED}")
    user, _, password = account.partition(":")
    prefix = f"/{path.strip('/')}/" if path.strip("/") else ""
    return StoreAddress(
        scheme=scheme,
        hosts=hosts,
        prefix=prefix,
        user=unquote(user) or None,
        password=unquote(password) or None,
    )


def _host(text: str, shown: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.port and not parts.path:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"{shown!r}: {text!r} is not host:port; allowed: {ALLOWED}")


def is_ours(host: str) -> bool:
    """Whether ``host`` is (a name of) this machine. Raises ConfigError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--store: {host}: {error.strerror or error}") from None
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EACCES, errno.EINVAL):
                raise ConfigError(f"--store: {host}: {error.strerror or error}") from None
        else:
            return True
    return False


def listening_host(host: str) -> str | None:
    """What to listen on to be found at ``host``; None: every address, where a host's own name leads to its loopback alone."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return None
    is_literal = host == "localhost" or host in addresses
    loopback = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    return None if loopback and not is_literal else host


def etcd_files() -> dict[str, str | None]:
    """The files that ``etcds://`` goes by, from the environment."""
    return {"ca": os.environ.get(CA), "key": os.environ.get(KEY), "certificate": os.environ.get(CERTIFICATE)}
