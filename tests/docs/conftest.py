"""The extensions of the documentation import as they do for Sphinx; without Sphinx their tests are left out."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "ext"))

collect_ignore = [] if importlib.util.find_spec("sphinx") else ["test_docs_coverage.py"]
