"""The jobs that run on Ray: the only rooms that import it."""
