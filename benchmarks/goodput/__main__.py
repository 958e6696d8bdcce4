import sys

from benchmarks.goodput.command import main

sys.exit(main())
