"""Pages: what every HTML page shares: its style, plots in the page's own colours, numbers in words, templates."""
