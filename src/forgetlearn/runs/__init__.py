"""One update or evaluation over its run folder."""
