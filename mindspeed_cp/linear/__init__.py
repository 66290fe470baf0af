"""Context parallelism for layers with a recurrent state (linear attention, state-space models)."""
