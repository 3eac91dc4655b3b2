"""What the records of benchmarks/fragility.py say of the ranking of layers."""

from statistics import fmean

from fragility_nulls import partial_spearman, spearman

OURS = "risk"
NORM_ONLY = "norms: certificate of the logits"
ENTROPY = "entropy"


def layer_correlations(records: list[dict], precision: str, fixed: str | None = None) -> dict[str, list[float]]:
    """score → rank correlation with the measured mismatch in every setting, that of a `fixed` score taken out."""
    mine = [r for r in records if r["kind"] == "layers" and r["precision"] == precision]
    names = mine[0]["scores"] if mine else {}
    if fixed is None:
        return {name: [spearman(r["scores"][name], r["measured"]) for r in mine] for name in names}
    return {
        name: [partial_spearman(r["scores"][name], r["measured"], r["scores"][fixed]) for r in mine] for name in names
    }


def _wins(ours: list[float], theirs: list[float]) -> str:
    """In how many settings ours is higher, in words."""
    pairs = list(zip(ours, theirs, strict=True))
    equal = sum(a == b for a, b in pairs)
    return f"higher in {sum(a > b for a, b in pairs)} of {len(pairs)} settings" + (
        f", equal in {equal}" if equal else ""
    )


def _ahead(ours: list[float], theirs: list[float]) -> bool:
    """Higher on average, and in most settings."""
    return fmean(ours) > fmean(theirs) and sum(a > b for a, b in zip(ours, theirs, strict=True)) > len(ours) / 2


def _of_model(records: list[dict], model: str) -> tuple[tuple[bool, bool], str]:
    """Whether the predictor is ahead of the norm-only and the entropy baseline on a model, and its numbers in words."""
    found = layer_correlations([r for r in records if r.get("model") == model], "float8_e4m3")
    means = [fmean(found[name]) for name in (OURS, NORM_ONLY, ENTROPY)]
    said = "{:+.2f} against {:+.2f} (norms) and {:+.2f} (entropy)".format(*means)
    if "depth" in found:
        said += f" and {fmean(found['depth']):+.2f} (depth)"
    return (_ahead(found[OURS], found[NORM_ONLY]), _ahead(found[OURS], found[ENTROPY])), f"{model} {said}"


def verdict(records: list[dict]) -> str:
    """Whether the predictor ranks layers by FP8 error better than the norm-only and entropy baselines, from the numbers."""
    found = layer_correlations(records, "float8_e4m3")
    n = len(found[OURS])
    parts, better = [], []
    for baseline in (NORM_ONLY, ENTROPY):
        better.append(_ahead(found[OURS], found[baseline]))
        parts.append(f"{baseline}: {fmean(found[baseline]):+.2f}, the predictor {_wins(found[OURS], found[baseline])}")
    names = {
        (True, True): "better than both the norm-only and the entropy baseline",
        (True, False): "better than the norm-only baseline, but not than entropy",
        (False, True): "better than entropy, but not than the norm-only baseline",
        (False, False): "no better than either the norm-only or the entropy baseline",
    }
    models = list(dict.fromkeys(r["model"] for r in records if r["kind"] == "layers"))
    each = dict(zip(models, (_of_model(records, model) for model in models), strict=True))
    where = f" over all settings together, {names[better[0], better[1]]}"
    if len({ahead for ahead, _ in each.values()}) > 1:
        where = f", on {'; on '.join(f'{model} {names[ahead]}' for model, (ahead, _) in each.items())};{where}"
    if "depth" in found:
        fixed = layer_correlations(records, "float8_e4m3", fixed="depth")[OURS]
        parts.append(
            f"depth alone, earlier layers first: {fmean(found['depth']):+.2f}, the predictor {_wins(found[OURS], found['depth'])}; "
            f"with depth held fixed the predictor's correlation is {fmean(fixed):+.2f}"
        )
    best = max(found, key=lambda name: fmean(found[name]))
    tail = "" if best == OURS else f" The best score of all here is “{best}” ({fmean(found[best]):+.2f})."
    return (
        f"**The predictor ranks layers by measured FP8 error{where}** (mean rank correlation {fmean(found[OURS]):+.2f} over {n} "
        f"settings; {'; '.join(parts)}). By model: {'; '.join(said for _, said in each.values())}.{tail}"
    )
