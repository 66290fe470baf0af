"""Attention over a split sequence: the call, the ring engine, Ulysses around it, merging; the public entry."""
