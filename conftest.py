"""For tests and tested notebooks alike: the kernels that notebooks run in inherit this environment."""

import os

# Spinning OpenMP threads make a step several times slower when something else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test goes to the network: what is asked of the hub is out of reach at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Notebooks show smoke runs instead of results.
os.environ["FAMBA_PROFILE"] = "smoke"

from hypothesis import settings

settings.register_profile("fuzz", max_examples=2000)  # make fuzz; what fails is kept in .hypothesis and tried first
