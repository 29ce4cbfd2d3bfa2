import sys

from famba.cli import main

sys.exit(main())
