"""What README, cards and tables say was measured is what the files of rows hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_documents_hold_the_measured_rows():
    command = [sys.executable, str(ROOT / "examples" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
