"""Container health: exit 0 where a worker of this host has a fresh heartbeat and is ready."""

import os
import socket
import sys

from redis import RedisError

from openlora.joblog import redis_client
from openlora.protocol.codec import decode_heartbeat
from openlora.protocol.names import WORKERS_KEY, worker_key


def main() -> int:
    """0 healthy, 1 not (the reason on stderr)."""
    host = socket.gethostname()
    client = redis_client(os.environ["OPENLORA_REDIS"])
    try:
        names = [member.decode() for member in client.smembers(WORKERS_KEY)]
        values = client.mget([worker_key(name) for name in names]) if names else []
    except RedisError as error:
        print(f"Redis does not answer: {error}", file=sys.stderr)
        return 1
    # A heartbeat expires after seconds, so one that is there is fresh.
    beats = [decode_heartbeat(value) for value in values if value is not None]
    if any(beat.host == host and beat.ready for beat in beats):
        return 0
    print(f"no ready worker of host {host} among {len(beats)} heartbeat(s)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
