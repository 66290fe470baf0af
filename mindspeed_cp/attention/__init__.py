"""Attention over a split sequence: the public entry, the ring engine, Ulysses around it, and merging."""
