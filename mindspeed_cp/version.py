"""The version of this package, for those below its first module."""

__version__ = "0.1.0"
