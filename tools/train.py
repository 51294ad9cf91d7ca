"""`python tools/train.py CONFIG ...` is `xtuner-lite train CONFIG ...`."""

import sys

from xtuner_lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
