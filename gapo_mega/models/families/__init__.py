"""Model families. Every file of this folder that defines a ``Family`` is one; see docs/extending.md."""
