"""Fine-tune one stage with transformers' Trainer; an interrupted stage can be resumed."""
