"""`pytest -p tests.store.with_mooncake`: the tests of stores run in Mooncake, too, and those of its services.

In the environment of `make test-cluster`, which has Mooncake; what it needs of Debian's packages is installed here, or
named. Elsewhere the same tests run in a directory alone.
"""

from __future__ import annotations

from xllm_lab.cluster_services import install

install()
