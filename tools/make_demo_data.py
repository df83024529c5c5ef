"""python tools/make_demo_data.py ...: `megamug data demo ...` for those who call it by its path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megamug.commands import door  # noqa: E402

if __name__ == "__main__":
    door("demo_data")
