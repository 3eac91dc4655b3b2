"""The model card of a run."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants

from .corpus import DEFAULT_TEXT
from .failures import InputError
from .results import RunMetrics, loss_gap
from .sources import HUB_TIMEOUT, find_model


def _told_by(model: str) -> dict[str, Any]:
    """Metadata of a model's own card, from its folder or, unless it is offline, the Hub; empty where there is none."""
    path = Path(model).expanduser()
    try:
        if path.exists():
            readme = (path if path.is_dir() else path.parent) / "README.md"
            return ModelCard.load(readme).data.to_dict() if readme.exists() else {}
        if constants.HF_HUB_OFFLINE:
            return {}
        found = HfApi().model_info(model, timeout=HUB_TIMEOUT).card_data
        return {} if found is None else found.to_dict()
    except Exception:  # a card that cannot be read or reached tells nothing; the run does not depend on it
        return {}


def known_base(model: str) -> str | None:
    """Hub id of the model that was trained, where it is one or its folder tells it; of an adapter, that of its base."""
    if not Path(model).expanduser().exists():
        return model
    try:
        base = find_model(model).adapter_base
    except InputError:
        base = None
    told = base or _told_by(model).get("base_model")
    told = told[0] if isinstance(told, list) and told else told
    return told if isinstance(told, str) and not Path(told).expanduser().exists() else None


def _metadata(metrics: RunMetrics) -> ModelCardData:
    model, dataset = metrics.settings["model"], metrics.settings.get("dataset")
    told = _told_by(model)
    named = {name: told[name] for name in ("license", "license_name", "license_link", "language") if told.get(name)}
    if dataset is not None and not Path(dataset).expanduser().exists():
        named["datasets"] = [dataset]
    return ModelCardData(
        base_model=known_base(model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-geoscale", "fp8"] if metrics.in_fp8 else [],
        **named,
    )


def _settings(settings: dict) -> dict[str, Any]:
    """Settings for a reader: where the text came from in one entry, and local models by name, without a path."""
    model, dataset = Path(settings["model"]).expanduser(), settings.get("dataset")
    shown: dict[str, Any] = {"model": model.name if model.exists() else settings["model"]}
    if settings.get("text"):
        shown["text"] = Path(settings["text"]).name
    elif dataset:
        name = Path(dataset).name if Path(dataset).expanduser().exists() else dataset
        shown["text"] = f"column {settings['column']!r} of the split {settings.get('split', 'train')!r} of {name}"
    else:
        shown["text"] = DEFAULT_TEXT
    return shown | {
        n: value for n, value in settings.items() if n not in ("model", "text", "dataset", "column", "split")
    }


def card(metrics: RunMetrics, baseline: RunMetrics | None, with_plot: bool) -> str:
    """The card's text, metadata on top."""
    return ModelCard.from_template(
        _metadata(metrics),
        template_path=str(Path(__file__).with_name("card_template.md")),
        model=_settings(metrics.settings)["model"],
        run=metrics,
        settings=_settings(metrics.settings),
        baseline=baseline,
        gap=None if baseline is None else loss_gap(metrics, baseline),
        with_plot=with_plot,
        number=lambda value: "–" if value is None else f"{value:.4f}",
    ).content


def write_card(metrics: RunMetrics, baseline: RunMetrics | None, output: Path, with_plot: bool) -> None:
    (output / "README.md").write_text(card(metrics, baseline, with_plot), encoding="utf-8")
