"""Exact retrieval: scores of queries with candidates, ranks of what is relevant, metrics, baselines, fusion."""
