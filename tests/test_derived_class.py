"""A module that becomes an instance of a class derived from its own."""

from __future__ import annotations

import copy
import pickle

from torch import nn

from qkern.derived_class import DerivedClass, derive, own_class, restore


class First(DerivedClass):
    pass


class Second(DerivedClass):
    _derived_prefix = "Second"


def test_it_is_still_one_of_its_own_class_through_copies_and_pickles() -> None:
    module = nn.Linear(3, 2)
    module.note = "kept"
    derive(module, First)
    for one in (module, copy.deepcopy(module), copy.copy(module)):
        assert isinstance(one, nn.Linear)
        assert isinstance(one, First)
        assert type(one) is type(module)
        assert type(one).__name__ == "QuantizedLinear"
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(module)
        assert again.note == "kept"
        assert again.weight.equal(module.weight)


def test_what_is_derived_twice_has_the_last_one_and_can_be_restored() -> None:
    module = nn.Linear(3, 2)
    for added in (First, Second):
        derive(module, added)
        assert own_class(module) is nn.Linear
    assert not isinstance(module, First)
    assert type(module).__name__ == "SecondLinear"
    restore(module)
    assert type(module) is nn.Linear
    restore(module)
    assert type(module) is own_class(module) is nn.Linear
