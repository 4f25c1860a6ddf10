"""From data and a model to an adapter and its metrics."""
