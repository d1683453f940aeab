"""Links in model directories: a stranger's must not make us read, and copy, files of this machine."""

from __future__ import annotations

from pathlib import Path

_TEMPLATES = "additional_chat_templates"
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"  # of the hub's cache, whose snapshots are made of links


def refuse_links_outside(directory: Path, parameter: str = "model.path") -> None:
    """Raise ``ValueError``, beginning with ``parameter``, for a file of a model that lies elsewhere.

    The directory itself may be a link. Links of the hub's cache lead to its own ``blobs`` and are taken.
    """
    if not directory.is_dir():
        return  # a name on the hub
    for entry in [*sorted(directory.iterdir()), *sorted((directory / _TEMPLATES).glob("*"))]:
        if entry.is_file() or entry.name == _TEMPLATES:
            require_inside(entry, directory, parameter)


def require_inside(file: Path, directory: Path, parameter: str = "model.path") -> None:
    """Raise ``ValueError`` unless ``file``, its links followed, lies in the model's ``directory``."""
    root, found = directory.resolve(), file.resolve()
    allowed = [root]
    if root.parent.name == _SNAPSHOTS:
        allowed.append(root.parent.parent / _BLOBS)
    if not any(found.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{parameter}: {file} leads to {found}, outside of {root}; accepted: a model whose files lie in "
            "its own directory (copy the file there)"
        )
