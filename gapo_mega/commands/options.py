"""What several commands take on their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.files import local

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", parser=local, metavar="PATH", help="YAML file of the run.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Start this many local processes. Not inside torchrun.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Remove what an earlier run wrote in output_dir, and begin anew."),
]
OVERWRITE = "--overwrite"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of --dtype, and their names in torch
