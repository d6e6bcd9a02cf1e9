"""Watch a folder of saved classifiers, and find out which of them to load or to drop.

Files are compared by content. Polling needs no notifications, which network file systems do not send.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_vl_classifier.files.whole import recover_folder
from qwen_vl_classifier.serving.models.served_folders import is_classifier


@dataclass(frozen=True, slots=True)
class Seen:
    """What a folder of a classifier held when it was looked at.

    Attributes:
        folder: The folder.
        digest: That of its version; "" if it could not be read.
    """

    folder: Path
    digest: str


class Watch:
    """A folder whose classifiers are served.

    Args:
        folder: The folder.

    Attributes:
        folder: Its absolute path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._last: dict[str, Seen] = {}
        self._before: dict[str, Seen] = {}

    def look(self) -> dict[str, Seen]:
        """Return the classifiers in the folder now, by name; one that was there stays one while its folder is there.

        Raises:
            OSError: It cannot be listed.
        """
        from qwen_vl_classifier.serving.models.loading_models import version_of  # brings torch

        for name in self._before.keys() - self._last.keys():
            recover_folder(self.folder / name)  # if whoever replaced it was killed between two renames
        found = {}
        for folder in sorted(self.folder.iterdir()):
            if not (folder.name in self._last or is_classifier(folder)):
                continue
            try:
                found[folder.name] = Seen(folder, version_of(folder).digest)
            except OSError:
                found[folder.name] = Seen(folder, "")
        self._before, self._last = self._last, found
        return found

    @property
    def settled(self) -> dict[str, Seen]:
        """What was the same in the last two looks: nobody was writing to it."""
        return {name: seen for name, seen in self._last.items() if self._before.get(name) == seen}

    def is_gone(self, name: str) -> bool:
        """Tell whether neither of the last two looks found the folder."""
        return name not in self._last and name not in self._before
