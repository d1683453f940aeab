"""Runs check modules on every rank: ``torchrun driver.py JOBS.json RESULTS.json``.

JOBS.json is a list of ``[module, arguments]``; ``module.run(arguments)`` is called on every rank and
rank 0's results are written down. A job that raises on every rank is reported and the next one runs.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    import torch.distributed as dist

    from tests.distributed import worlds

    jobs: list[list[Any]] = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    results: list[dict[str, Any]] = []
    for module, arguments in jobs:
        try:
            results.append({"result": importlib.import_module(f"tests.distributed.{module}").run(arguments)})
        except Exception:  # reported to the test, which fails with it
            results.append({"error": traceback.format_exc()})
            print(f"rank {dist.get_rank()}: {results[-1]['error']}", file=sys.stderr, flush=True)
            worlds.leave()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    worlds.leave()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
