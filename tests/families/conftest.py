"""What the families' tests share: a case, made once for all laws."""

import pytest

pytest.register_assert_rewrite("family_laws")


@pytest.fixture(scope="class")
def case(request, tmp_path_factory):
    """The case that a class of `FamilyLaws` is at, in a folder of its own."""
    return open_case(request.cls, request.param, tmp_path_factory)


@pytest.fixture(scope="class")
def first_case(request, tmp_path_factory):
    """The first case of a class of `FamilyLaws`."""
    return open_case(request.cls, next(iter(request.cls.cases)), tmp_path_factory)


def open_case(laws, name, tmp_path_factory):
    from family_laws import make_case

    fields = laws.cases[name]
    return make_case(fields["model_type"], name, fields, tmp_path_factory.mktemp("case"))
