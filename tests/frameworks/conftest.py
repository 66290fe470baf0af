"""These tests run in an environment of their own, made by scripts/test_frameworks.sh; elsewhere they are left out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mcore_bridge") else ["test_*.py"]
