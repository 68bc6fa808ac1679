"""Messages of the libraries that load and run models go to a file, not to the user's terminal."""

import logging
import logging.handlers
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

LOG = Path("~/.cache/voxray/libraries.log")
MAX_BYTES = 1 << 20


@cache
def log_library_messages() -> None:
    """Send the warnings of transformers and PEFT to ``LOG``, once per process.

    They are about the libraries' own options, which voxray's users do not set. A level in TRANSFORMERS_VERBOSITY leaves
    transformers' messages on the terminal.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which PEFT imports, warns about the CPU
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    handler: logging.Handler = logging.NullHandler()
    with suppress(OSError):  # no home folder, or one that cannot be written
        LOG.expanduser().parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(LOG.expanduser(), maxBytes=MAX_BYTES, backupCount=1, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"))
    transformers_logging.disable_default_handler()
    for name in ("transformers", "peft"):
        logging.getLogger(name).addHandler(handler)
