"""The version of voxray."""

__version__ = "0.1.0"
