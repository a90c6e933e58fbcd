"""Adapter records and versions in Redis, shared by gateways, workers and the command line."""

from openlora.registry.aio import AsyncAdapterRegistry
from openlora.registry.records import check_adapter_id
from openlora.registry.sync import AdapterRegistry

__all__ = ["AdapterRegistry", "AsyncAdapterRegistry", "check_adapter_id"]
