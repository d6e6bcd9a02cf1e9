"""The families of a test that is not about one of them: one of each kind of decoder, and the others under soak."""

from __future__ import annotations

import pytest

from tests import nano

FAMILIES = [
    family if family in nano.KINDS else pytest.param(family, marks=pytest.mark.soak) for family in nano.FAMILIES
]
