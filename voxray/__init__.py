"""Jobs on Ray that fine-tune and evaluate audio language models."""

__version__ = "0.1.0"
