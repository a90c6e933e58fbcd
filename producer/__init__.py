"""Jobs into Kafka: their topic and key, the publisher, the topics themselves, the sweeper."""
