import sys

from benchmarks.memory.command import main

sys.exit(main())
