"""Chat templates: the tokenizer's own with a proved loss mask, and named presets."""
