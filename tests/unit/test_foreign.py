"""Who gives the miniature real photographs is told what it can draw."""

import pytest
from PIL import Image

from echodistill_core.concept.photographs import Photograph
from echodistill_core.miniature.concepts import CONCEPTS, outside_domain_warning, photographs


@pytest.mark.parametrize("concept", CONCEPTS)
def test_its_own_toys_are_no_foreigners(concept):
    assert outside_domain_warning(photographs(CONCEPTS[concept]), CONCEPTS[concept].class_noun) == ""


@pytest.mark.parametrize(("size", "noun"), [((640, 480), "mug"), ((64, 64), "dog"), ((640, 480), "dog")])
def test_photographs_of_real_things_are(size, noun):
    found = outside_domain_warning([Photograph("a.jpg", Image.new("RGB", size))], noun)
    assert "eight toys only (ball, star, heart, mug, fish, mushroom, house, cat)" in found
    assert "SD-Turbo" in found
