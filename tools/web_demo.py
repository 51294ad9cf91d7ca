"""`python tools/web_demo.py MODEL ...` is `xtuner-lite web-demo MODEL ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xtuner_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["web-demo", *sys.argv[1:]]))
