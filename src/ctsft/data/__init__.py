"""Text: rows from files and the hub, tokens, and the built-in questions about databases."""
