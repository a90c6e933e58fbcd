"""What travels between the processes: jobs, events, and the names of topics, keys and channels."""
