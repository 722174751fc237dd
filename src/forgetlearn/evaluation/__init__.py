"""Ask a model and score what it says: rows per fact, means with intervals."""
