"""Hugging Face directory -> Megatron checkpoint, under the name that Megatron users look for.

    python tools/convert_hf_to_megatron.py --from HF_DIR --to CKPT [--tp 2 --pp 2]

The same as ``gapo-mega convert``, which reads the direction off its input.
"""

import sys

from gapo_mega.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "--format", "megatron"]
    main()
