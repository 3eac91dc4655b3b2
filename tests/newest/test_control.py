"""The judge itself: what is upstream's failure, and what is ours."""

import pytest
import torch

from hf_geoscale import patch_model

from ..conftest import tiny_model, tokens
from .control import Outcome, compare, run


def scenario(spoil=lambda logits: logits, patch=patch_model, fails=()):
    def of(patched: bool) -> Outcome:
        if patched in fails:
            raise RuntimeError(f"broken with patched={patched}")
        model, ids = tiny_model("llama").train(), tokens(2, 24)
        model = patch(model) if patched else model
        logits = model(ids).logits.detach()
        return Outcome({"logits": spoil(logits) if patched else logits}, {}, model)

    return of


def test_agreement_passes():
    compare(scenario())


@pytest.mark.parametrize("fails", [(False,), (False, True)])
def test_what_fails_unpatched_is_upstreams(fails):
    with pytest.raises(pytest.xfail.Exception, match="RuntimeError: broken with patched=False"):
        compare(scenario(fails=fails))


def test_what_fails_patched_alone_is_ours():
    with pytest.raises(RuntimeError, match="patched=True"):
        compare(scenario(fails=(True,)))


@pytest.mark.parametrize(
    ("spoil", "patch", "message"),
    [
        (lambda logits: 1.2 * logits, patch_model, "logits: 0.2.* from upstream's own attention"),
        (lambda logits: logits + torch.nan, patch_model, "logits: nan"),
        (lambda logits: logits, lambda model: model, "logits: 0.0000 from"),
        (lambda logits: logits, lambda model: patch_model(model, fused_front_end=False), "fused_front_end=False"),
    ],
    ids=["a wrong result", "not a number", "nothing patched", "the interface"],
)
def test_what_the_judge_sees(spoil, patch, message):
    with pytest.raises(AssertionError, match=message):
        compare(scenario(spoil, patch))


def test_commands():
    def command(fails):
        def of(patched: bool) -> None:
            if patched in fails:
                raise OSError("no such thing")

        return of

    run(command(()))
    run(command((False,)))  # upstream's failure alone shows in what is compared
    with pytest.raises(OSError, match="no such thing"):
        run(command((True,)))
    with pytest.raises(pytest.xfail.Exception, match="no such thing"):
        run(command((True, False)))
