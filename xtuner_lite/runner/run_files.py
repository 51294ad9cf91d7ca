"""Names of the files that a run writes at its start into its log folder."""

CONFIG_FILE = "config.py"
ENVIRONMENT_FILE = "environment.txt"
