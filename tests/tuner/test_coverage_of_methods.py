"""A method that is registered is tested: the cases of these tests are over all of them."""

from tuner_cases import CASES, METHODS, ONE_EACH, OPTIONS


def test_every_method_has_cases():
    covered = {config().method for config, _ in OPTIONS.values()}
    assert covered == set(METHODS)


def test_every_selection_holds_every_method():
    for selection in (ONE_EACH, [param.values[0].method for param in CASES]):
        assert {OPTIONS[name][0]().method for name in selection} == set(METHODS)
