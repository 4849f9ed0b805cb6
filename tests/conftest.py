"""Fixtures that several files share."""
import pytest


@pytest.fixture
def one_thread():
    "One thread of torch: quicker on small models, and bit for bit the same."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
