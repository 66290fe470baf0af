"""Predict what context parallelism sends and how long it waits, by running the engine itself without processes."""
