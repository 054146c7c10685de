"""Settings that must be made before transformers, DeepSpeed and bitsandbytes are imported."""

import logging
import os

import torch

# Tokenizers must not start threads before the data loader forks
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses right, but warns at every start
# Warns at every import that an optional CPU kernel is missing, also when nothing is quantised
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
