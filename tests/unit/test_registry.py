"""A registry behaves as a mapping and refuses names that would hide a part."""

import pytest

from echodistill_core.errors import InputError
from echodistill_core.registry import Registry


def test_it_is_a_mapping_in_order_of_registration():
    found = Registry("part", {"b": 1})
    assert found.register("a", 2) == 2
    assert (dict(found), list(found), len(found)) == ({"b": 1, "a": 2}, ["b", "a"], 2)
    found.unregister("a")
    assert "a" not in found


@pytest.mark.parametrize("name", ["b", "", "step", "a=b", "a b"])
def test_names_that_are_taken_reserved_or_malformed_are_refused(name):
    found = Registry("part", {"b": 1}, pattern="[a-z]+", reserved=("step",))
    with pytest.raises(InputError, match="part"):
        found.register(name, 2)
    assert dict(found) == {"b": 1}
