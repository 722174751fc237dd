"""Methods, coefficients and seeds on one base, side by side in one table."""
