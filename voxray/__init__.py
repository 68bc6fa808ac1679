"""Jobs on Ray that fine-tune and evaluate audio language models."""

from voxray.core.version import __version__

__all__ = ["__version__"]
