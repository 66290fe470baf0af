"""Positions of a sequence as integers: which rank holds them, what queries may see of them, which blocks follow."""
