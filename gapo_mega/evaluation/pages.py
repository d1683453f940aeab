"""HTML pages, made of the templates beside this file."""

from __future__ import annotations

import jinja2

from gapo_mega.types import well_formed


def page_of(template: str, **values: object) -> str:
    """The text of ``template`` with ``values``, which it escapes. One that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gapo_mega.evaluation", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return well_formed(environment.get_template(template).render(**values))
