"""The gateway: clients' websockets and HTTP in front of Kafka and Redis. Imports no torch."""
