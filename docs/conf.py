"""The documentation site: README.md and what it leads to, as they are in the repository (`make docs`)."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "gapo_mega"
release = version = metadata.version("gapo-mega")
copyright = "the gapo_mega authors, Apache-2.0"

# The sources lie where a reader of the repository finds them, so their links hold in both places.
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/**.md",
    "docker/*.md",
    "benchmarks/results/2026-11-29-*.md",  # tables that pages name
    "benchmarks/results/2026-11-30-*.md",
]
exclude_patterns = [".*", "build", "models", "runs", "**/__pycache__", "**/*.egg-info"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # as GitHub makes them; a link to one that does not exist is a warning

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Types of other packages are no links, as the site is built without the network. Those of the configuration
# have a page of their own, docs/reference/configuration.md.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!gapo_mega).*"),
    (r"py:class", r"gapo_mega\.(config\..*|types\.AnyBatch|objectives\.base\.(Objective|SharedCall))"),
]

html_theme = "furo"
html_title = f"gapo_mega {release}"
html_show_sphinx = False
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}

CONTENTS = {
    "README": """

```{toctree}
:hidden:
:caption: Start
docs/tutorial/training
docs/tutorial/own_loop
docs/demo
docs/pipeline
```

```{toctree}
:hidden:
:caption: Use
docs/commands
docs/pairs
docs/sweep
docs/evaluate
docs/chat
docs/loggers
docs/data
docs/run_directories
docs/operations
docs/ranks
docs/while_training
docs/rewards
docs/conversion
docs/generation
docs/rollouts
docs/layouts
docs/audit
docs/scalarizers
docs/glossary
docs/memory
docs/lora
docs/gpu
docs/versions
docs/extending
docs/reference/configuration
docs/reference/python
```

```{toctree}
:hidden:
:caption: How it works
docs/methods
docs/maths
docs/losses
docs/kl
docs/fidelity
docs/gradients
docs/kernels
docs/peers
docs/testbed
benchmarks/results/2026-11-29-testbed-cpu
docs/comparison
docs/throughput
benchmarks/results/2026-11-29-survive-cpu
benchmarks/results/2026-11-30-survive-cpu
docs/choosing
docs/architecture
docs/adr/README
```

```{toctree}
:hidden:
:caption: Project
CONTRIBUTING
CHANGELOG
SECURITY
docker/README
docs/README
```
""",
    "docs/adr/README": """

```{toctree}
:hidden:
:glob:
0*
```
""",
}


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The site's tables of contents, which GitHub would show as code."""
    source[0] += CONTENTS.get(docname, "")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
