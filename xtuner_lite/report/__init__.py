"""A run as one page: curves, chat samples over time, data ledger, config and environment."""
