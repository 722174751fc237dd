"""One update or evaluation over its run folder, from the input to the report."""
