"""The worker: takes jobs from Kafka, runs them on the engine, logs every token in Redis."""
