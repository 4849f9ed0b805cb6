"""Fixtures that several files share, and what must not come last."""
import pytest

from folders import demos, home, no_work, short # fixtures

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
