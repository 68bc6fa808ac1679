"""Model families. Importing any of them keeps the libraries below from chattering into a job's output."""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
