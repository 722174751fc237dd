"""Write the reports of runs and comparisons, as Markdown and HTML."""
