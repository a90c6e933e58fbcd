"""Embedded broker and Redis: real servers as child processes, for `openlora up` and the tests."""

from openlora.local.process import ServerProcess, ServerSpec, free_port
from openlora.local.servers import embedded_broker, embedded_redis

__all__ = ["ServerProcess", "ServerSpec", "embedded_broker", "embedded_redis", "free_port"]
