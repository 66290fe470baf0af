"""A toy library and a module that holds copies of its names."""

import pytest
from toy_modules import module_from

LIBRARY = """
def double(x):
    return 2 * x

def triple(x):
    return 3 * x

FLAG = True

class Base:
    def speak(self):
        return "base"

class Child(Base):
    def walk(self):
        return "child"

    @staticmethod
    def helper(x):
        return x

    @classmethod
    def name(cls):
        return cls.__name__
"""


@pytest.fixture
def library(monkeypatch):
    return module_from("toy_library", LIBRARY, monkeypatch)


@pytest.fixture
def user(library, monkeypatch):
    """A module that holds copies, one of them under another name."""
    return module_from(
        "toy_user",
        "from toy_library import double, FLAG, Child\nfrom toy_library import double as twice\n",
        monkeypatch,
    )
