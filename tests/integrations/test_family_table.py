"""docs/families.md is complete, and three of its rows are still what the script finds."""

import re

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import OUT, VERDICTS, examine
from hf_geoscale.integrations import FAMILIES
from hf_geoscale.integrations.refusals import REFUSED

TEXT = OUT.read_text()
VERSION = re.search(r"in transformers (\S+) and", TEXT)[1]
ROWS = {
    cells[0]: cells[1:]
    for cells in re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", TEXT, re.MULTILINE)
}

pytestmark = [
    pytest.mark.feature("family table"),
    pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"docs/families.md is of transformers {VERSION}"),
]


def test_every_family_has_a_verdict():
    assert set(ROWS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for name, (_, verdict, reason, _) in ROWS.items():
        assert verdict in VERDICTS, name
        assert verdict == "native" or reason not in ("–", ""), name


def test_no_reason_is_unknown():
    assert "geometry is unknown" not in TEXT
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("model_type", ["phi3", "bloom", "gpt_oss"])
def test_a_row_is_what_the_script_finds(model_type):
    row = examine(model_type)
    assert [row.model_class, row.verdict, row.reason or "–", row.asks] == list(ROWS[model_type])


def test_a_model_with_two_text_configurations_is_refused_by_its_own_reason():
    """transformers answers `get_text_config()` of them with a ValueError."""
    row = examine("musicgen")
    assert (row.verdict, row.reason) == ("refused", REFUSED["musicgen"])
