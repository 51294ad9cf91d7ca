"""`python tools/check_data.py CONFIG ...` is `xtuner-lite check-data CONFIG ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xtuner_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
