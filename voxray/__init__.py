"""voxray: fine-tune and evaluate audio language models on Ray."""

__version__ = "0.1.0"
