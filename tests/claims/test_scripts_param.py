import pytest
from smoke import check, scripts


@pytest.mark.parametrize("name", scripts("param"))
def test_it_still_works(name, capsys):
    check(name, capsys)
