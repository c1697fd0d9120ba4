"""Settings that all tests share."""

import os

from hypothesis import settings

# Both without a deadline: a first trace takes seconds. CI draws the same examples every time.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
