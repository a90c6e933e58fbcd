"""Adapter records and versions in Redis, shared by gateways, workers and the command line."""

from openlora.registry.aio import AsyncAdapterRegistry
from openlora.registry.records import OPERATOR, check_adapter_id, parse_reference
from openlora.registry.sync import AdapterRegistry

__all__ = [
    "OPERATOR",
    "AdapterRegistry",
    "AsyncAdapterRegistry",
    "check_adapter_id",
    "parse_reference",
]
