"""Names and files to loaded models."""
