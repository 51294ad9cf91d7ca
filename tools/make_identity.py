"""Write a self-introduction data set; the same as ``xtuner-lite make-identity``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xtuner_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["make-identity", *sys.argv[1:]]))
