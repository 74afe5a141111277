"""The one place where the version of kvtcp is written."""

__version__ = "0.1.0"
