"""Run an update or an evaluation, and write its run folder."""
