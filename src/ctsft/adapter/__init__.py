"""The adapter: its settings, its algebra, its layers in a model, and its file."""
