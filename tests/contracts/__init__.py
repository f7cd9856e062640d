"""Base classes of tests: subclass one, give `make()`, and the contract's tests run on your class."""

import pytest

pytest.register_assert_rewrite("contracts.encoder")
