"""Work with an updated model: read its history, undo or rebuild it, publish it, inspect its changes."""
