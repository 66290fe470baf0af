"""Integer arithmetic on positions: which rank holds them, which keys a query may see, which blocks must be computed."""
