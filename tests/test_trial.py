"""A minute of the trial: hostile folders and plans, killed commands, failing disks."""
import errno
import os
import subprocess
import sys
from unittest.mock import patch

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked and measured as on Linux")


@pytest.mark.parametrize("words", [["kills", "4"], ["folders", "150"], ["faults"]], ids=lambda w: w[0])
def test_trial(words):
    "Each in a process of its own, since its children are forked; what it counts is printed."
    seed = os.environ.get("FIPS_NB_TRIAL_SEED", "0")
    res = subprocess.run([sys.executable, __file__, *words, "--seed", seed], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    print(res.stdout)
    assert res.returncode == 0, res.stdout + res.stderr[-2000:]


def shorter():
    "The trial on few blocks of the demo, at steps found in a short search, with one error for each call."
    from small import blank_picture, first_blocks # here, so that no child imports what they need
    n = 6 if "folders" in sys.argv else 3
    with patch("fips_nb.data.demo.demo_vit", lambda pretrained=True: first_blocks(n)), \
         patch("fips_nb.store.cards.plot_layers", blank_picture), patch("fips_nb.round.sizes.SPARE_BYTES", .5):
        import trial
        trial.ERRORS = (errno.ENOSPC,) # no code of the package asks which
        return trial.main()


if __name__ == "__main__": sys.exit(shorter())
