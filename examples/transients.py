"""Sudden changes of the weights under every scaling strategy: what overflows, and what the loss does.

python examples/transients.py MODEL OUTPUT_FOLDER            # all scenarios, three seeds; `hf-geoscale transients` has the options

The table and the figure lie in the output folder afterwards.
"""

import sys
from pathlib import Path

from rich.console import Console

from hf_geoscale.cli.transients import Settings, run_transients

if len(sys.argv) != 3:
    sys.exit(__doc__)
run_transients(Settings(model=sys.argv[1]), Path(sys.argv[2]), Console())
print((Path(sys.argv[2]) / "transients.md").read_text())
