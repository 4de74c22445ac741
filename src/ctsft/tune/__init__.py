"""One fine-tuning run: recipe, training, measuring, record and report."""
