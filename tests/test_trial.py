"""A minute of the trial: hostile folders and plans, killed commands, failing disks."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIAL = Path(__file__).with_name("trial.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked and measured as on Linux")


@pytest.mark.parametrize("words", [["folders", "250"], ["kills", "6"], ["faults"]], ids=lambda w: w[0])
def test_trial(words):
    "Each in a process of its own, since its children are forked; what it counts is printed."
    seed = os.environ.get("FIPS_NB_TRIAL_SEED", "0")
    res = subprocess.run([sys.executable, str(TRIAL), *words, "--seed", seed], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    print(res.stdout)
    assert res.returncode == 0, res.stdout + res.stderr[-2000:]
