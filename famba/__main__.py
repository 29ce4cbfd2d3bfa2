import gc
import sys

from famba.cli import main

gc.set_threshold(100_000, 50, 100)  # imports make 600,000 objects that stay, which it would look through repeatedly
sys.exit(main())
