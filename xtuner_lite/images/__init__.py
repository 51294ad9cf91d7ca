"""Images: opened safely, and turned into a model's inputs and their places in the text."""
