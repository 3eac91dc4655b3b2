"""Why a decoder family is refused: what its attention does that FP8 attention or a certificate does not have."""

_MLA = "multi-head latent attention (MLA): keys and values share a compressed token, and their heads differ in size"
_NO_INTERFACE = "its attention is code of its own, which never calls transformers' attention interface"
_ALIBI = "ALiBi adds a position bias to the logits, in code of its own outside the attention interface"
_RECURRENT = "it is recurrent and has no softmax attention"
_HYBRID = "some of its layers are recurrent, linear or convolutional; all layers must be softmax attention"
_SINKS = "attention sinks add a term to every softmax"
_POST_NORM = "its norm layers follow attention and MLP with a shift, and no norm layer precedes q, k and v"
_CROSS = "a decoder of an encoder-decoder model: post-norm or with cross-attention, whose keys come from elsewhere"
_MULTIMODAL = "a multimodal model, whose other towers call the same attention interface"
_SPARSE = "sparse attention picks keys per query, which is no range of keys"
_SHARED = "layers share keys and values with earlier layers or take them without a projection of their own"
_POSITION_BIAS = "a learned position bias is added to the logits"

REFUSED = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"),
            *("deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4", "sarvam_mla"),
        ),
        _MLA,
    ),
    **dict.fromkeys(
        (
            *("codegen", "cpmant", "ctrl", "gpt_neo", "gpt_neox_japanese", "gptj", "megatron-bert", "openai-gpt"),
            *("reformer", "rembert", "roformer", "xglm", "xlm", "xlnet"),
        ),
        _NO_INTERFACE,
    ),
    **dict.fromkeys(("bloom", "falcon", "mpt"), _ALIBI),
    "falcon": _NO_INTERFACE + "; ALiBi in some checkpoints",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), _RECURRENT),
    **dict.fromkeys(
        (
            *("bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe"),
            *(
                "lara_mini",
                "lfm3",
                "minimax",
                "nemotron_h",
                "olmo_hybrid",
                "qwen3_5",
                "qwen3_5_moe",
                "qwen3_5_moe_text",
            ),
            *("qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "zamba", "zamba2"),
        ),
        _HYBRID,
    ),
    **dict.fromkeys(
        ("deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
        _SINKS,
    ),
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roc_bert"),
            *("xlm-roberta", "xmod"),
        ),
        _POST_NORM,
    ),
    "big_bird": _SPARSE,
    "minimax_m3_vl_text": _SPARSE,
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "prophetnet", "trocr", "whisper", "musicgen", "musicgen_melody"),
        ),
        _CROSS,
    ),
    **dict.fromkeys(
        (
            *("blt", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "mllama"),
            *("mllama_text_model", "moss_transcribe_diarize", "phi4_multimodal"),
        ),
        _MULTIMODAL,
    ),
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_assistant", "gemma4_text", "gemma4_unified_assistant", "gemma4_unified_text"), _SHARED
    ),
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text", "inkling_text"), _POSITION_BIAS),
    "beam": "queries of layers without RoPE are multiplied by a factor that grows with the position",
    "bitnet": "the linear layers of its checkpoints quantise what enters them, so that W is not what they compute",
    "blt": "a byte-level model of several transformers with cross-attention between them",
    "cohere_compass_text": "it has not been checked: no tiny model of it can be built from its config",
    "diffllama": "differential attention subtracts two softmaxes",
    "doge": "a dynamic mask that depends on the values hides keys",
    "dory": "a learned factor multiplies each channel of its queries after RoPE",
    "jetmoe": "a mixture of attention experts: queries come from the experts of each token",
    "llama4": "temperature tuning multiplies queries by a factor that grows with the position",
    "llama4_text": "temperature tuning multiplies queries by a factor that grows with the position",
    "moshi": "each of its projections is a list of linear layers, one a codebook",
    "ministral3": "queries are multiplied by a factor that grows with the position",
    "modernbert-decoder": "its first layer has no norm layer of its own; the one of the embedding precedes it",
    "roberta-prelayernorm": "its norm layer and its projections are in different modules, which no reader understands",
    "xlm-roberta-xl": "its norm layer and its projections are in different modules, which no reader understands",
    "zaya": "its queries and keys go through convolutions over the sequence",
}
"""`config.model_type` → reason, of the decoder families in transformers 5.24; docs/families.md has them all."""
