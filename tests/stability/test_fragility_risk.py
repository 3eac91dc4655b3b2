"""Risk, its sum and the report, by hand."""

import pytest

from hf_geoscale.stability import FragilityReport
from hf_geoscale.stability.fragility_risk import ROUNDOFFS, add_risks, combined_v1, downstream, resolve_rest, transport


def rows() -> list[dict]:
    one = {"layer": 0, "attention_gain": 0.5, "mlp_gain": 1.0, "attention_magnitude": 8.0, "norm_magnitude": 2.0}
    one |= {"remainder_magnitude": 3.0}
    other = {"layer": 1, "attention_gain": 0.0, "mlp_gain": 0.25, "attention_magnitude": 16.0, "norm_magnitude": 1.0}
    return [one, other | {"remainder_magnitude": 0.0}]


def test_the_published_roundoffs_and_e4m3():
    assert ROUNDOFFS == {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "float8_e4m3": 2**-4}


def test_transport_and_downstream():
    assert transport(0.5, 1.0) == 0.5 + 1.0 * 1.5
    assert 1 + transport(0.5, 1.0) == (1 + 0.5) * (1 + 1.0)
    assert downstream([2.0, 0.25, 3.0]) == [1.25 * 4, 4.0, 1.0]


def test_the_risk_of_a_layer():
    found = rows()
    add_risks(found, final_norm=10.0, precision="bfloat16", rest="bfloat16")
    assert [row["downstream"] for row in found] == [1.25, 1.0]
    assert [row["risk"] for row in found] == pytest.approx([2**-8 * 13 / 10 * 1.25, 2**-8 * 17 / 10])
    add_risks(found, 10.0, "float8_e4m3", "float32")
    assert found[1]["risk"] == pytest.approx((2**-4 * 16 + 2**-24) / 10)


def test_what_the_rest_runs_in():
    assert resolve_rest("float8_e4m3", None) == "bfloat16"
    assert resolve_rest("float16", None) == "float16"
    assert resolve_rest("float8_e4m3", "float32") == "float32"
    with pytest.raises(ValueError, match=r"precision must be one of .*'float8_e4m3'.*, got 'fp8'"):
        resolve_rest("fp8", None)
    with pytest.raises(ValueError, match=r"rest must be one of .*, got 'int8'"):
        resolve_rest("bfloat16", "int8")


def test_the_predictor_of_v1():
    row = {"kappa_softmax_v1": 2.0, "kappa_score": 3.0, "kappa_value": 5.0, "output_sigma": 7.0, "kappa_eff": 11.0}
    row["c_norm"] = 13.0
    assert combined_v1([row, row], "float16") == 2 * (2 * 4 * 5 * 7 + 11 + 13) * 2**-11
    assert combined_v1([row, row | {"kappa_eff": None}], "float16") is None


def test_the_table():
    found = rows()
    add_risks(found, 10.0, "bfloat16", "bfloat16")
    report = FragilityReport(found, "bfloat16", "bfloat16", sum(r["risk"] for r in found), None, 10.0, 12)
    lines = report.to_markdown().splitlines()
    assert len(lines) == 6
    assert lines[0].count("|") == lines[2].count("|") == len(FragilityReport.COLUMNS) + 1
    assert "| 8 | 2 | 3 |" in lines[2]
    assert "12 tokens: sum of risks 0.013." in lines[-1]
    assert report.worst_layer == 1
