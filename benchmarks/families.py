"""What happens to every decoder family of the installed transformers: found by doing, written to docs/families.md.

Each family of `AutoModelForCausalLM` is built tiny from its config class, run as it is, patched, run with a loss and a
backward; what it asks of the attention interface is recorded by an attention of our own. One forked process a family, with
limits on time and memory.

    python benchmarks/families.py                     # all, and writes docs/families.md
    python benchmarks/families.py llama olmo2         # some, printed only
"""

import argparse
import multiprocessing
import resource
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_geoscale import UnsupportedAttentionError, UnsupportedModelError, geometry_report, patch_model
from hf_geoscale.integrations import FAMILIES

OUT = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS, BYTES = 60, 10 * 2**30
LENGTH = 24
SPREAD = 0.08
"""Standard deviation added to every parameter, so that gains, shifts and biases are away from 1 and 0."""

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **{"vocab_size": 96, "mamba_n_heads": 8, "mamba_num_heads": 8, "first_k_dense_replace": 1},
}
"""Tiny values of the config fields that decide a model's size. Every token visits every expert, so that no rounding flips a
choice of experts, whose effect on the logits would hide the attention's."""

OVERRIDES: dict[str, dict] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 4},
    **{name: {"attention_multiplier": 0.25} for name in ("granite", "granitemoe", "granitemoeshared")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
}
"""What a family needs beyond `SIZES` to be built, and logits of an ordinary size."""

ASKED = {"softcap": "soft cap", "s_aux": "attention sinks", "position_bias": "position bias", "indices": "sparse keys"}
"""Arguments of the attention interface that change the result, and what they mean."""


VERDICTS = ("native", "refused")


@dataclass
class Row:
    """One family."""

    model_type: str
    model_class: str
    verdict: str  # of VERDICTS; anything else is an error of ours
    reason: str
    asks: str = ""  # what its own forward asks of the attention interface
    utilisation: float | None = None  # largest entry / certificate
    error: float | None = None  # relative, of the logits


def shrink(config) -> dict:
    """Keyword arguments that make a config of this class tiny, its sub-configs too."""
    small: dict = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            small[name] = shrink(value)
        elif name in SIZES and isinstance(value, int):
            small[name] = SIZES[name]
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = value % 8
        elif name.endswith("token_id") and isinstance(value, list):
            small[name] = [token % 8 for token in value]
    return small


def tiny(model_type: str, **overrides):
    """A tiny model of a family in float32 and eval mode, all parameters moved by `SPREAD`."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**shrink(cls()) | OVERRIDES.get(model_type, {}) | overrides)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * SPREAD)
    return model.eval()


def forward(model):
    ids = torch.randint(8, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids, use_cache=False)


def asked(model) -> str:
    """What the model's forward asks of the attention interface, seen by an attention of our own."""
    seen: set[str] = set()

    def spy(module, query, key, value, attention_mask, **call):
        seen.add("calls it")
        given = {name: call.pop(name, None) for name in ASKED}
        seen.update(ASKED[name] for name, what in given.items() if what is not None)
        if value.shape[-1] != query.shape[-1]:
            seen.add(f"heads of v ({value.shape[-1]}) unlike q and k ({query.shape[-1]})")
        if query.shape[2] != key.shape[2]:
            seen.add("keys of another length")
        if not call.get("is_causal", getattr(module, "is_causal", True)):
            seen.add("not causal")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **call)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    try:
        model.set_attn_implementation("spy")
        with torch.no_grad():
            forward(model)
    except Exception as error:  # a model of any library code
        seen.add(f"{type(error).__name__} with another attention")
    return ", ".join(sorted(seen)) or "never calls it"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def refusal(model_type: str) -> str:
    """The reason `patch_model` gives for a model of this family, from a model that has only a config."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # its defaults fail its own validation
        config = transformers.PretrainedConfig()
        config.model_type = model_type
    if config.model_type in FAMILIES:
        return ""

    class Shell(transformers.PreTrainedModel):
        config_class = type(config)

    try:
        patch_model(Shell(config))
    except UnsupportedModelError as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    """The reason alone of "model_type 'x' is not supported: reason. Supported: …"."""
    return str(error).partition("is not supported: ")[2].partition(". Supported:")[0] or str(error)


def examine(model_type: str, **overrides) -> Row:
    """Build, run, patch, run again and train a step."""
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "not built", "")
    row.reason = ", ".join(f"{name}={value}" for name, value in overrides.items())
    try:
        model = tiny(model_type, **overrides)
        with torch.no_grad():
            exact = forward(model).logits
    except Exception as error:  # of any library code: the family is judged by its config alone
        row.reason = refusal(model_type)
        row.verdict = "refused" if row.reason else f"not built: {_first_line(error)}"
        return row
    try:
        patch_model(model, backend="reference")
        out = forward(model)
        out.loss.backward()
    except (UnsupportedModelError, UnsupportedAttentionError) as error:
        row.verdict, row.reason = "refused", _reason(error)
        row.asks = asked(tiny(model_type, **overrides))
        return row
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    rows = geometry_report(model).rows
    if not gradients or not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise RuntimeError(f"{model_type} patched has no finite gradients")
    if any(r["overflows"] or r["fallback_calls"] or not r["calls"] for r in rows):
        raise RuntimeError(f"{model_type} patched did not run every layer in FP8 without overflow: {rows}")
    row.verdict, row.asks = "native", asked(tiny(model_type, **overrides))
    row.utilisation = max(r["utilisation"] for r in rows)
    row.error = float((out.logits.detach() - exact).norm() / exact.norm())
    return row


def _in_process(model_type: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        row = examine(model_type)
    except Exception as error:
        row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "failed", _first_line(error))
    pipe.send(asdict(row))


def examine_apart(model_type: str) -> Row:
    """`examine` in a forked process, so that no family's size or hang stops the table."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    row = None
    try:
        if mine.poll(SECONDS):
            row = Row(**mine.recv())
    except EOFError:  # it died: out of memory
        pass
    process.kill()
    process.join()
    if row is None:
        reason = refusal(model_type)
        verdict = "refused" if reason else f"not built within {SECONDS} s and {BYTES / 2**30:.0f} GiB"
        row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], verdict, reason)
    return row


def to_markdown(rows: list[Row]) -> str:
    """docs/families.md."""
    counts = Counter(row.verdict for row in rows)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    lines = [
        "# Decoder families",
        "",
        f"Every family of `AutoModelForCausalLM` in transformers {transformers.__version__} and what `patch_model` does with it: "
        f"{len(rows)} families, {total}.",
        "",
        "Generated by `python benchmarks/families.py`, which builds each family tiny from its config class, runs it, patches it,",
        "and runs it again with a loss and a backward pass. *native*: patched and certified; every layer's attention ran in FP8",
        "without an overflow, and every gradient was finite. *refused*: `patch_model` raised `UnsupportedModelError` with this",
        'reason (`fallback="sdpa"` leaves such a model to SDPA, counted). *Asks* is what the unpatched model\'s forward asks of',
        "transformers' attention interface. *Used* is the largest entry of q, k or v over its certificate, *error* the relative",
        "error of the logits against SDPA, both of a random model of two layers whose gains, shifts and biases are away from",
        "1 and 0: they show that the patch ran, not how a trained model fares. *(not run)*: its own forward needs more than",
        "`input_ids`, or no tiny model could be built, so that only the refusal was seen.",
        "",
        "| family | class | verdict | reason or setting | asks | used | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{x:.3f}" if x is not None else "–" for x in (row.utilisation, row.error)]
        cells = [
            f"`{row.model_type}`",
            row.model_class,
            row.verdict,
            row.reason or "–",
            row.asks or "(not run)",
            *numbers,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, everything = [], sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type in arguments.families or everything:
        rows.append(examine_apart(model_type))
        print(*asdict(rows[-1]).values(), sep=" | ", flush=True)
    if not arguments.families:
        OUT.write_text(to_markdown(rows))
    failed = [row for row in rows if row.verdict not in VERDICTS]
    if failed:
        raise SystemExit(f"no verdict for {[row.model_type for row in failed]}")


if __name__ == "__main__":
    main()
