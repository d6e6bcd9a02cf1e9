"""Give package indexes the README with absolute links; everything else is declared in pyproject.toml.

On GitHub, links in the README are relative: they work in forks and branches. A package index has no files beside the
README, so there each link leads to the repository at the tag of this version.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import urljoin

from setuptools import setup

ROOT = Path(__file__).parent
PICTURE = re.compile(r"""(!\[[^\]]*\]\(|\bsrc(?:set)?=")([^)\s"]+)""")
LINK = re.compile(r"""(\]\(|\bhref=")([^)\s"]+)""")


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Make relative links of a Markdown text absolute, anchors within the page included.

    Args:
        text: A page that lies at the root of the repository as README.md.
        repository: The address of the repository, without a slash at its end.
        tag: The version of the files that links lead to.
    """
    pictures, pages = (f"{repository}/{view}/{tag}/README.md" for view in ("raw", "blob"))
    text = PICTURE.sub(lambda match: match[1] + urljoin(pictures, match[2]), text)
    return LINK.sub(lambda match: match[1] + urljoin(pages, match[2]), text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / "qwen_vl_classifier" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    setup(
        long_description=absolute_links(
            (ROOT / "README.md").read_text(encoding="utf-8"), project["urls"]["Repository"], f"v{version}"
        ),
        long_description_content_type="text/markdown",
    )
