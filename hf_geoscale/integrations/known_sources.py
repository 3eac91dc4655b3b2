"""Fingerprints of upstream code that the fused forwards restate, by release. Made by tests/upstream/collect.py."""

WALK = "22ae7f49f1f9319b"
"""Of the code that made them."""

RELEASES = {
    "liger_kernel": "0.6 to 0.8",
    "transformers": "4.57 to 5.24",
}
"""Minor releases that were read."""

KNOWN = {
    "liger_kernel.transformers.rope:liger_rotary_pos_emb": {
        "9033e0552c0e8181": "0.6 to 0.8",
        "464a3e80274c338d": "0.8",
        "3c3c7bbdbcc5d478": "0.8",
    },
    "transformers.cache_utils:Cache.update": {
        "a150a54d551b8208": "4.57 to 5.3",
        "e29ade4cde1ddd30": "5.4 to 5.19",
        "38545748cb028bee": "5.20 to 5.24",
    },
    "transformers.cache_utils:DynamicLayer.update": {
        "6c55b9e1380099ca": "4.57",
        "6af86a794fd4d3e6": "5.0 to 5.3",
        "ce143efcc7fc10ba": "5.4 to 5.24",
    },
    "transformers.cache_utils:DynamicSlidingWindowLayer.update": {
        "38ebe2f77ae11f8f": "4.57",
        "f72e80b231fc631b": "5.0 to 5.3",
        "95556393b80f3877": "5.4 to 5.14",
        "f353cc1166ec0f57": "5.15 to 5.17",
        "3260afc4ad427b1a": "5.18 to 5.24",
    },
    "transformers.modeling_rope_utils:dynamic_rope_update.wrapper": {
        "991ae4a80cb63ba3": "4.57",
        "b8b9d59642e0e624": "5.0 to 5.24",
    },
    "transformers.models.dots1.modeling_dots1:Dots1Attention.forward": {
        "1212152d2d57e443": "4.57",
        "198585c1d1869ea6": "5.0",
        "eed915b4313f219b": "5.1 to 5.3",
        "db45ad32734e9ada": "5.4 to 5.23",
        "560af2d68615cc3a": "5.24",
    },
    "transformers.models.dots1.modeling_dots1:Dots1RMSNorm.forward": {
        "7ea0d9e43b5d5eda": "4.57 to 5.24",
    },
    "transformers.models.dots1.modeling_dots1:Dots1RotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.17",
        "09af4f01d7593909": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.dots1.modeling_dots1:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.dots1.modeling_dots1:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.models.gpt2.modeling_gpt2:GPT2Attention.forward": {
        "a64b782d7a008b33": "4.57",
        "7d3ac8db07d3e78b": "5.0",
        "a9277fb69875984a": "5.1 to 5.3",
        "20b5da160fd29ff4": "5.4 to 5.23",
        "ff771a01d2173fa0": "5.24",
    },
    "transformers.models.llama.modeling_llama:LlamaAttention.forward": {
        "195cd446f0e5ddc9": "4.57",
        "3db26574731c8e8f": "5.0",
        "67f7b892bc4234a3": "5.1 to 5.3",
        "c04d8e0a352e121b": "5.4 to 5.23",
        "dcb7327044728e60": "5.24",
    },
    "transformers.models.llama.modeling_llama:LlamaRotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.14",
        "cfb9d70f6a971f77": "5.15 to 5.17",
        "68e589d29c09481b": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.llama.modeling_llama:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.llama.modeling_llama:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.models.mellum.modeling_mellum:MellumAttention.forward": {
        "db45ad32734e9ada": "5.10 to 5.23",
        "560af2d68615cc3a": "5.24",
    },
    "transformers.models.mellum.modeling_mellum:MellumRMSNorm.forward": {
        "7ea0d9e43b5d5eda": "5.10 to 5.24",
    },
    "transformers.models.mellum.modeling_mellum:MellumRotaryEmbedding.forward": {
        "3c39b208c18c32ba": "5.10 to 5.14",
        "a88f7463279c6c4f": "5.15 to 5.17",
        "35fb7d1a054ca6c8": "5.18",
        "c1d4d2fe75ba97d8": "5.19 to 5.23",
        "e5bf9a5811cc772b": "5.24",
    },
    "transformers.models.mellum.modeling_mellum:apply_rotary_pos_emb": {
        "c886acedf5c3f6d9": "5.10 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.mellum.modeling_mellum:rotate_half": {
        "69e07d1239e82c7e": "5.10 to 5.24",
    },
    "transformers.models.mistral.modeling_mistral:MistralAttention.forward": {
        "7a6ebd632ce57891": "4.57",
        "7308f17aae0bf42c": "5.0",
        "9dd0a9cf050bb132": "5.1 to 5.3",
        "00bc56a65979aba1": "5.4 to 5.23",
        "a8c634bbe58a633f": "5.24",
    },
    "transformers.models.mistral.modeling_mistral:MistralRotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.14",
        "cfb9d70f6a971f77": "5.15 to 5.17",
        "68e589d29c09481b": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.mistral.modeling_mistral:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.mistral.modeling_mistral:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.models.qwen2.modeling_qwen2:Qwen2Attention.forward": {
        "9cd11ae0aa0456c1": "4.57",
        "569fcc3464c4dc21": "5.0",
        "1376bd52c3dcd124": "5.1 to 5.3",
        "737b4e114c153d3b": "5.4 to 5.23",
        "e74d0658dd5bca36": "5.24",
    },
    "transformers.models.qwen2.modeling_qwen2:Qwen2RotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.17",
        "09af4f01d7593909": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.qwen2.modeling_qwen2:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.qwen2.modeling_qwen2:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.models.qwen3.modeling_qwen3:Qwen3Attention.forward": {
        "1212152d2d57e443": "4.57",
        "198585c1d1869ea6": "5.0",
        "eed915b4313f219b": "5.1 to 5.3",
        "db45ad32734e9ada": "5.4 to 5.23",
        "560af2d68615cc3a": "5.24",
    },
    "transformers.models.qwen3.modeling_qwen3:Qwen3RMSNorm.forward": {
        "7ea0d9e43b5d5eda": "4.57 to 5.24",
    },
    "transformers.models.qwen3.modeling_qwen3:Qwen3RotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.17",
        "09af4f01d7593909": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.qwen3.modeling_qwen3:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.qwen3.modeling_qwen3:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeAttention.forward": {
        "1212152d2d57e443": "4.57",
        "198585c1d1869ea6": "5.0",
        "eed915b4313f219b": "5.1 to 5.3",
        "db45ad32734e9ada": "5.4 to 5.23",
        "560af2d68615cc3a": "5.24",
    },
    "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeRMSNorm.forward": {
        "7ea0d9e43b5d5eda": "4.57 to 5.24",
    },
    "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeRotaryEmbedding.forward": {
        "d0af1db8e95afb61": "4.57",
        "f7a3a8545579766b": "5.0 to 5.14",
        "cfb9d70f6a971f77": "5.15 to 5.17",
        "68e589d29c09481b": "5.18",
        "6369ff626237c13c": "5.19 to 5.23",
        "0c352344797c3013": "5.24",
    },
    "transformers.models.qwen3_moe.modeling_qwen3_moe:apply_rotary_pos_emb": {
        "3b3ee6bcadff1181": "4.57",
        "c886acedf5c3f6d9": "5.0 to 5.14",
        "f3fd2e38f3b18f82": "5.15 to 5.24",
    },
    "transformers.models.qwen3_moe.modeling_qwen3_moe:rotate_half": {
        "69e07d1239e82c7e": "4.57 to 5.24",
    },
    "transformers.utils.deprecation:deprecate_kwarg.wrapper.wrapped_func": {
        "58e1767767f98572": "4.57 to 5.24",
    },
}
