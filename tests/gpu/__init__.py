"""Whether this project's device code is right, and how fast it is: on one NVIDIA GPU.

``make gpu``, or ``python -m tests.gpu --out FOLDER``; ``docs/gpu.md`` says what is checked, and how
to read the results. Each stage is a module of that name, with a function ``run(notes)`` that runs
in a process of its own.
"""
