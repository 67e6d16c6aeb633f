"""Blocks and records the connections this process tries to make, so that "nothing is sent" is seen, not believed."""

import socket
import sys
from typing import Any

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def block_network(attempts: list[str]) -> None:
    """From now on look-ups and connections beyond this machine fail with OSError; `attempts` gets the host of each.

    Python's audit hooks see every Python socket, and also those of forked children (which append to their own copy,
    but are blocked all the same). A native library with its own sockets is not seen.
    Source: https://docs.python.org/3/library/audit_events.html
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto"):
            sock, address = arguments
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return
            host = address[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else str(host or "localhost")
        if not host.startswith(LOOPBACK):
            attempts.append(host)
            raise OSError(f"fasttune verify blocks the network: {host}")

    sys.addaudithook(hook)
