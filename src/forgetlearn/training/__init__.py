"""One stage of fine-tuning on transformers' Trainer, resumable."""
