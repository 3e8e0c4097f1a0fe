"""python -m tests.golden FOLDER"""

import argparse
import sys
from pathlib import Path

from tests.golden.runner import main

parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
parser.add_argument(
    "folder",
    type=Path,
    nargs="?",
    default=Path(__file__).parent / "cases",
    help="a folder of method folders, or one method's folder; the bundled cases by default",
)
sys.exit(main(parser.parse_args().folder))
