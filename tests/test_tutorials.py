"""The tutorials, typed as they say: what they print and the pictures that they draw."""

import pytest
from pages import TUTORIALS, execute, name_of, pictures_of


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_a_tutorial_prints_and_draws_what_it_says(page, tmp_path):
    execute(page, tmp_path)
    pictures = pictures_of(page)
    assert pictures
    assert all((tmp_path / path.name).stat().st_size > 5_000 for path in pictures)
