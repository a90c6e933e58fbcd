"""A broker that is not there is one clear line, soon."""

from __future__ import annotations

import pytest

from openlora.errors import SetupError
from workers.assignor import SamePartitionsAssignor
from workers.kafka_client import connect_consumer


@pytest.mark.parametrize("servers", ["127.0.0.1:1", "no-such-host.invalid:9092"])
def test_no_broker_is_a_setup_error(servers):
    with pytest.raises(SetupError, match=f"no Kafka broker answers at {servers}"):
        connect_consumer(servers, "test", SamePartitionsAssignor(), timeout_ms=300)
