"""What all files of this folder share."""

from __future__ import annotations

from tests.helpers.ranks.file_groups import groups_end_with_the_file as groups_end_with_the_file
