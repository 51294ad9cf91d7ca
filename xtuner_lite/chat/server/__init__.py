"""An OpenAI-compatible HTTP server for one model: ``xtuner-lite serve``."""
