"""From a checkpoint to pictures and numbers (not the HuggingFace library of this name)."""
