"""Lets the tests import the scripts of the repository's root, from wherever pytest is started."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
