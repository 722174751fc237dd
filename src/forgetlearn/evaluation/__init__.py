"""Ask a model questions and score its answers: rows per fact, and means with intervals."""
