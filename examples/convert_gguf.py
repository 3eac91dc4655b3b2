"""Turn a GGUF file into an ordinary transformers folder, once, so that it loads in a second afterwards.

python examples/convert_gguf.py model.Q4_1.gguf folder
"""

import sys

from hf_geoscale.cli.loading import load

if len(sys.argv) != 3:
    sys.exit(__doc__)
model, tokenizer = load(sys.argv[1])
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
print(f"{sys.argv[2]}: {model.num_parameters():,} parameters in float32")
