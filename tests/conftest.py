"""Fixtures that several files share, and what must not come last."""
import time

import pytest

from folders import demos, fips, home, no_work, short, shorter  # noqa: F401 (fixtures)

# each takes a minute or more in few tests: they go first, so that no process is left alone with one
LONG = ("test_trial", "test_site", "test_finetune", "test_cli_text")


def pytest_collection_modifyitems(items):
    "Long files first; else as they are collected."
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def one_thread():
    "One thread of torch: quicker on small models, and bit for bit the same."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def timed_once(monkeypatch):
    "Forecasts call what they time once and not for a tenth of a second, which is most of a run of a small model."
    def seconds_of(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    for name in ("share.forecast", "round.code"): monkeypatch.setattr(f"fips_nb.{name}.seconds_of", seconds_of)
