"""Map functions: one per source format, each from a row to messages or text."""
