"""Layers whose tokens see what is before them through a state: the exchanges that give each rank what it computes."""
