"""Real processes are killed, stopped and cut off; every stream is checked token by token."""
