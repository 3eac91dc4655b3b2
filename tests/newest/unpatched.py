"""Run an example as upstream alone would: `python unpatched.py examples/trainer.py ARGUMENTS`, where hf_geoscale does nothing."""

import runpy
import sys
from types import SimpleNamespace

from transformers import TrainerCallback

import hf_geoscale


class Idle(TrainerCallback):
    """A callback that takes what GeoScaleCallback takes."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def attach(self, trainer) -> None:
        pass


hf_geoscale.patch_model = hf_geoscale.unpatch_model = lambda model, *args, **kwargs: model
hf_geoscale.refresh_scales = lambda *args, **kwargs: None
hf_geoscale.geometry_report = lambda model: SimpleNamespace(rows=[], to_markdown=lambda *args, **kwargs: "")
hf_geoscale.GeoScaleCallback = Idle
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
