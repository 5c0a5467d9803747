"""`launchers/run_stage.py` with a fault in it, for real launchers: the environment variable FAULT holds it as JSON."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launchers import run_stage
from tests.faults.injection import install

if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    install(json.loads(os.environ.get("FAULT", "null")), rank)
    run_stage.leave(run_stage.main())
