"""What ``/metrics`` shows. One registry per gateway, so that tests can run several in a process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.tier_metrics import TierMetrics

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60)


class Metrics:
    """The gateway's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        # Plain numbers: a Counter's lock would cost a tenth of what sending a frame does.
        self.frames_sent = 0
        self.frames_received = 0
        registry.register(_FrameCounts(self))
        self.tiers = TierMetrics()
        registry.register(self.tiers)
        self.jobs = Counter(
            "openlora_gateway_jobs",
            "Jobs by outcome: accepted, stop, length, cancelled, or an error code.",
            ["outcome"],
            registry=registry,
        )
        self.connections = Gauge(
            "openlora_gateway_connections", "Open websocket connections.", registry=registry
        )
        self.streams = Gauge("openlora_gateway_streams", "Streams being sent.", registry=registry)
        self.ttft = Histogram(
            "openlora_gateway_ttft_seconds",
            "From a job's creation to its first token at the worker.",
            registry=registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self.accept = Histogram(
            "openlora_gateway_accept_seconds",
            "From a request's frame to `accepted`: log and broker included.",
            registry=registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self.events_dropped = Counter(
            "openlora_gateway_events_dropped",
            "Events not queued (slow client, gap, stream not begun); read from the log later.",
            registry=registry,
        )
        self.tokens_refilled = Counter(
            "openlora_gateway_tokens_refilled", "Tokens read from logs.", registry=registry
        )
        self.log_reads = Counter(
            "openlora_gateway_log_reads", "Reads of job logs by streams.", registry=registry
        )
        self.reconnects = Counter(
            "openlora_gateway_event_reconnects",
            "Times that the event subscription was re-established.",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "openlora_gateway_queue_depth",
            "Interactive jobs that wait in Kafka or at a worker, from heartbeats.",
            registry=registry,
        )

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _FrameCounts(Collector):
    """Shows the plain frame counts as counters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for direction, count in (
            ("sent", self._metrics.frames_sent),
            ("received", self._metrics.frames_received),
        ):
            yield CounterMetricFamily(
                f"openlora_gateway_frames_{direction}",
                f"Websocket frames {direction}.",
                value=count,
            )
