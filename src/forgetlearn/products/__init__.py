"""What becomes of an updated model: its history, the way back, publishing, looking inside."""
