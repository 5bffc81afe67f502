"""The miniature warns about photographs of subjects that it cannot draw."""

import pytest
from PIL import Image

from echodistill_core.concept.photographs import Photograph
from echodistill_core.miniature.concepts import CONCEPTS, outside_domain_warning, photographs


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_miniatures_own_subjects_give_no_warning(concept):
    assert outside_domain_warning(photographs(CONCEPTS[concept]), CONCEPTS[concept].class_noun) == ""


@pytest.mark.parametrize(("size", "noun"), [((640, 480), "mug"), ((64, 64), "dog"), ((640, 480), "dog")])
def test_photographs_of_real_things_give_a_warning(size, noun):
    found = outside_domain_warning([Photograph("a.jpg", Image.new("RGB", size))], noun)
    assert "(ball, star, heart, mug, fish, mushroom, house, cat)" in found
    assert "SD-Turbo" in found
