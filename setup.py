"""Build script; everything else is in pyproject.toml. The native extension is added here."""

from setuptools import setup

setup()
