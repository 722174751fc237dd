"""The paper's tables and figures on any model, beside the figures that it prints."""
