"""Read files of facts and decide which of their records can be used."""
