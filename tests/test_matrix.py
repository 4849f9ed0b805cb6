"""The matrix of what people do with a model: as the page says, cell by cell; every cell is right or refused."""
import json

import pytest

import matrix

pytestmark = [pytest.mark.usefixtures("timed_once"), pytest.mark.filterwarnings("ignore")]
SAID = json.loads(matrix.FILE.read_text())
LIVE = ("Llama", "own module") # the others are filled by `make trial`, as they take a quarter of an hour
CELLS = [(name, form) for name in LIVE for form in matrix.FORMS]


@pytest.fixture(scope="session")
def elsewhere():
    matrix.quiet()
    return matrix.Elsewhere()


def test_no_cell_is_empty_or_of_a_third_kind():
    want = {(title, name, form) for title, (_, names) in matrix.OPERATIONS.items() for name in names for form in matrix.FORMS}
    assert {(t, n, f) for t, x in SAID.items() for n, y in x.items() for f in y} == want
    assert {v for x in SAID.values() for y in x.values() for v in y.values()} == {"right", "refused"}


@pytest.mark.parametrize("name,form", CELLS, ids=[f"{n}-{f}" for n, f in CELLS])
def test_cells(name, form, elsewhere, tmp_path):
    case = matrix.Case(name, form, tmp_path, elsewhere)
    found = {t: matrix.cell(case, t) for t, (_, names) in matrix.OPERATIONS.items() if name in names}
    assert found == {t: SAID[t][name][form] for t in found}
