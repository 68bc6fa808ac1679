"""Model families. Importing any of them silences the log messages and warnings of the libraries below."""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
