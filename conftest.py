"""For tests and tested notebooks alike: the kernels that notebooks run in inherit this environment."""

import importlib.util
import os
import sys

# Spinning OpenMP threads make a step several times slower when something else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test goes to the network: what is asked of the hub is out of reach at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Notebooks show smoke runs instead of results.
os.environ["FAMBA_PROFILE"] = "smoke"

from hypothesis import HealthCheck, settings

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# Few examples, and the same each time, so that what fails is due to a change; make fuzz draws anew.
settings.register_profile("tests", relaxed, max_examples=40, derandomize=True)
settings.register_profile("fuzz", relaxed, max_examples=2000)  # what fails is kept in .hypothesis and tried first
settings.load_profile("tests")

# nbval imports jsonschema, which would compile a grammar of addresses for seconds, in each worker.
sys.modules.setdefault("rfc3987_syntax", None)
if importlib.util.find_spec("nbval"):  # which gpu-check does without
    pytest_plugins = ["nbval.plugin"]  # `-p no:nbval` in pyproject.toml, since it would come before this file
