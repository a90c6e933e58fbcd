"""Writes to many sockets, one right behind the other.

A step's tokens go to as many connections as it has streams, a small write each. Frame building and
the event loop's own way to a socket, gone through in turn with the system calls, leave each other's
memory cold: written in one short loop, a token costs a third less. It is for sockets that have
nothing buffered; whatever they do not take is their transport's to write, in its order.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

Write = tuple[int, bytes, Callable[[bytes], None]]
"""Descriptor, what to write, and the transport's ``write`` for what the socket does not take."""

_Send = Callable[[int, bytes, ctypes.c_size_t, int], int]

_FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)


def _find_send() -> _Send | None:
    """C's ``send``, called with the interpreter held: given up for each of so many short calls, it
    would go to another thread, which may keep it for half a millisecond. None where C's library
    is not at hand, or where a dead peer would raise a signal."""
    if sys.platform != "linux":
        return None
    try:
        send: Any = ctypes.PyDLL(None).send
    except (OSError, AttributeError):
        return None
    # No argtypes: ctypes passes an int as C's int and bytes by their address without them, and is
    # twice as quick. A length is no int of C's: it is given as a c_size_t.
    send.restype = ctypes.c_ssize_t
    found: _Send = send
    return found


_send = _find_send()
_KNOWN_SIZES = 1024
_SIZES = tuple(map(ctypes.c_size_t, range(_KNOWN_SIZES)))


def raw_descriptor(transport: Any) -> int:
    """The descriptor of a transport's plain stream socket; -1 where writes must go through it."""
    sock = transport.get_extra_info("socket")
    if _send is None or sock is None or transport.get_extra_info("ssl_object") is not None:
        return -1
    return int(sock.fileno())


def write_all(writes: Iterable[Write]) -> None:
    """Each of ``writes``, as far as its socket takes it now; the rest by its transport."""
    send, flags, sizes, known = _send, _FLAGS, _SIZES, _KNOWN_SIZES
    assert send is not None  # else nothing has a descriptor
    for descriptor, data, write in writes:
        length = len(data)
        size = sizes[length] if length < known else ctypes.c_size_t(length)
        sent = send(descriptor, data, size, flags)
        if sent != length:
            write(data[max(0, sent) :])
