"""One finished grid, written once for every test of its summary and its report."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_cells import made_up, two_tasks, work_off


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    return work_off(tmp_path_factory.mktemp("grid") / "made-up", two_tasks(), made_up)
