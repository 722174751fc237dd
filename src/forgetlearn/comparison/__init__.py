"""Compare methods, coefficients and seeds on one base, in one table."""
