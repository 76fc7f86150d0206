"""Other libraries' progress bars and warnings, kept out of quantkit's display."""

from __future__ import annotations

import os


def quiet() -> None:
    """From now on, in this process, transformers, tokenizers and the hub's client say errors only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
