"""`hf-geoscale transients` on a tiny model: every scenario and strategy, the table and the figure from the records."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hf_geoscale.cli import app
from hf_geoscale.cli.transients import (
    SCENARIOS,
    STRATEGIES,
    TRAINED,
    Settings,
    multiply_queries_and_keys,
    run_transients,
)
from hf_geoscale.cli.transients_report import to_markdown
from hf_geoscale.integrations.families import attention_sites

from ..conftest import tiny_model

runner = CliRunner()


@pytest.fixture(scope="module")
def played(tiny_folder, text_file, tmp_path_factory):
    """(host, records, folder) of one run of everything."""
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("transients")
    command = [
        "transients",
        str(tiny_folder),
        "--text",
        str(text_file),
        "--output",
        str(output),
        "--seeds",
        "2",
        "--steps",
        "9",
        "--length",
        "12",
    ]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    host, *records = [json.loads(line) for line in (output / "transients.jsonl").read_text().splitlines()]
    return host, records, output


def total(records, scenario, strategy, operands=("q", "k", "v", "logit", "logit gradient")) -> int:
    return sum(
        record["overflows"].get(operand, 0)
        for record in records
        if record["scenario"] == scenario and record["strategy"] == strategy
        for operand in operands
    )


def test_every_scenario_is_played_under_every_strategy(played):
    _, records, output = played
    runs = {(r["scenario"], r["strategy"], r["seed"]) for r in records}
    seeds = {scenario: 2 if scenario in TRAINED else 1 for scenario in SCENARIOS}
    assert runs == {(s, strategy, seed) for s in SCENARIOS for strategy in STRATEGIES for seed in range(seeds[s])}
    assert all(record["finite"] for record in records)
    assert (output / "transients.png").stat().st_size > 10_000


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_certificates_hold_through_every_change(played, scenario):
    _, records, _ = played
    assert total(records, scenario, "geometry") == 0
    mine = [r for r in records if r["scenario"] == scenario and r["strategy"] == "geometry"]
    assert all(0 < r["utilisation"] <= 1 and 0 < r["logit_utilisation"] <= 1 for r in mine)


def test_a_history_made_under_other_weights_overflows(played):
    _, records, _ = played
    assert total(records, "stress16", "delayed, max of 1024") > 0
    assert total(records, "stress16", "current") == 0


def test_a_resumed_run_has_forgotten_its_history(played):
    """Delayed scaling starts at 1 again, and this model's small values leave nearly all of the range unused."""
    _, records, _ = played
    mine = [r for r in records if (r["scenario"], r["strategy"], r["seed"]) == ("resume", "delayed, max of 1024", 0)]
    last_before = [r for r in mine if not r["event"]][-1]
    first_after = next(r for r in mine if r["event"])
    assert last_before["utilisation"] > 0.5
    assert first_after["utilisation"] < 0.1


def test_a_spike_changes_nothing_before_it(played):
    """Both spikes draw the same data: their first steps, the spike's first loss included, are the same."""
    _, records, _ = played

    def losses(scenario):
        return [
            r["loss"] for r in records if r["scenario"] == scenario and r["strategy"] == "geometry" and not r["seed"]
        ]

    assert losses("spike10")[:4] == losses("spike100")[:4]
    assert losses("spike10")[4:] != losses("spike100")[4:]


def test_the_table_is_made_of_the_records(played):
    host, records, output = played
    table = to_markdown(host, records)
    assert (output / "transients.md").read_text() == table + "\n"
    changed = [dict(r, overflows={"q": 12345}) if r["scenario"] == "fresh" else r for r in records]
    assert "37,035" in to_markdown(host, changed)  # three steps


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scenarios": ("earthquake",)}, "earthquake"), ({"strategies": ()}, "strategies"), ({"steps": 8}, "at least 9")],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(model="unused", **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stress_multiplies_queries_and_keys_alone(family):
    model, before = tiny_model(family), tiny_model(family)
    multiply_queries_and_keys(model, 4.0)
    for layer, (site, old) in enumerate(zip(attention_sites(model), attention_sites(before), strict=True)):
        for factor, mine, theirs in zip((4.0, 4.0, 1.0), site.projections(), old.projections(), strict=True):
            assert torch.equal(mine.weight, factor * theirs.weight), layer
    with pytest.raises(ValueError, match="Linear has no q_proj"):
        multiply_queries_and_keys(torch.nn.Linear(2, 2), 4.0)


def test_an_unknown_scenario_ends_the_command_with_its_name(tiny_folder, tmp_path):
    result = runner.invoke(app, ["transients", str(tiny_folder), "--output", str(tmp_path), "--scenario", "earthquake"])
    assert result.exit_code == 1
    assert "earthquake" in result.output


def test_a_run_that_diverges_is_recorded_to_its_end(tiny_folder, text_file, tmp_path):
    pytest.importorskip("matplotlib")
    settings = Settings(str(tiny_folder), str(text_file), ("spike10",), ("geometry",), 1, 9, 16, learning_rate=1e37)
    records = run_transients(settings, tmp_path, Console())
    assert [record["finite"] for record in records][:2] == [True, False]
    assert len(records) == 9
