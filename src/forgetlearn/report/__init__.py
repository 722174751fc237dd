"""Turn a run folder or a comparison into Markdown and HTML."""
