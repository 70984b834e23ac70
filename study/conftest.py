"""Tests run on the CPU, as those of extras/."""

import extras.conftest  # noqa: F401  # before torch is imported
