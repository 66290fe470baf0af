"""What can be set, every rule and every fallback once; what ranks must agree on; everything that is said aloud."""
