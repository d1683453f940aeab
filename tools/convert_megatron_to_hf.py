"""Megatron checkpoint -> Hugging Face directory, under the name that Megatron users look for.

    python tools/convert_megatron_to_hf.py --from CKPT --to HF_DIR

The same as ``gapo-mega convert``, which reads the direction off its input.
"""

import sys

from gapo_mega.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "--format", "hf"]
    main()
