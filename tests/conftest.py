"""Fixtures that several files share, and the order of the files."""
import pytest

# each takes a minute or more; xdist deals whole files in this order, and none of them may be left for the end
LONG = ("trial", "finetune", "cli_text", "architectures", "coded_memory", "planner", "hub", "kernels", "compare", "cli_kinds",
        "site", "three_lines", "cli")


def pytest_collection_modifyitems(items):
    "Long files first."
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture
def one_thread():
    "One thread of torch: quicker on small models, and bit for bit the same."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
