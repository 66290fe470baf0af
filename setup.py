"""Packaging. patches/ and arguments/ lie at the top of the repository, and links in mindspeed_cp give their names."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mindspeed_cp/version.py").read_text("utf-8"), re.M)[1]
README = ROOT / "README.md"

for link in ("patches", "arguments"):
    if not (ROOT / "mindspeed_cp" / link).is_dir():
        raise SystemExit(
            f"mindspeed_cp/{link} must be a link to ../{link}, and this copy of the repository has a plain file there. "
            "Git makes links with core.symlinks=true; else replace the file by a copy of that folder."
        )

TRAINER = [
    "einops",  # megatron-core 0.16 wants it for hierarchical process groups and does not declare it
    "matplotlib",  # the loss curves of scripts/quickstart.sh
    "psutil",  # megatron-core 0.12 imports it for checkpoints and does not declare it
    "rich",  # progress bar and tables
    "tensorboard",  # scalars of --tensorboard-dir
]
TEST = [
    *TRAINER,
    "hypothesis",  # property-based tests draw sizes, documents and masks
    "pytest",
    "pytest-xdist",  # scripts/test.sh: two tests at a time, since many wait for processes and time limits
]

setup(
    name="mindspeed_cp",
    version=VERSION,
    description="Context parallelism for Megatron-LM in one import: Ulysses, Ring, Double Ring, Hybrid, KV all-gather.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["mindspeed_cp", "mindspeed_cp.*"]),
    entry_points={"console_scripts": ["mindspeed-cp = mindspeed_cp.cli:main"]},
    package_data={"mindspeed_cp": ["py.typed"], "mindspeed_cp.planner": ["models.txt"]},
    install_requires=[
        "torch>=2.6",  # the lowest that megatron-core 0.16 takes; tests run on the version in constraints.txt
        "megatron-core>=0.12.1",  # the lowest version that tests run on
        "PyYAML>=5.4",  # --cp-config reads MindFormers' YAML files
        "numpy",  # plans of blocks for thousands of documents
    ],
    extras_require={
        "npu": ["torch-npu>=2.6"],  # Ascend: its release must match torch's and the installed CANN
        "train": TRAINER,  # scripts/pretrain_gpt.py
        "test": TEST,
        "dev": [*TEST, "mypy", "ruff", "setuptools", "wheel"],  # checks; packaging tests build without a network
    },
)
