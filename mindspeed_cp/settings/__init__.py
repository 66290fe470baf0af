"""All settings with their rules and fallbacks, the agreement of ranks on them, and all warnings."""
