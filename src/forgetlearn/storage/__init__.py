"""Write files in one step, hash them, lock them; the run folder."""
