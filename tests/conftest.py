"""What tests share: platform, virtual devices, compilation cache, optional packages and data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PLATFORM = os.environ.get("FLOWRL_TEST_PLATFORM", "cpu")
MAPPINGS = 20_000  # of a process, from which on programs are let go
VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"

# jax reads both when it is imported: pytest loads this file before any test module.
os.environ["JAX_PLATFORMS"] = "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {VIRTUAL_DEVICES}".strip()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs from one run of the tests to the next.

    Set in this process only. Programs that tests start, and kill, must not write to the cache: an
    entry cut short is never replaced (jax warns and compiles anew each time it reads it).
    """
    cache = getattr(config, "cache", None)
    if cache is None:  # pytest -p no:cacheprovider
        return
    import jax

    # Two processes may not write one entry at a time.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir(f"jax-programs-{worker}")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `accelerator` where none was asked for."""
    if PLATFORM == "cpu" and item.get_closest_marker("accelerator"):
        pytest.skip("needs a GPU or TPU: make test-accelerator ACCELERATOR=cuda (or tpu)")


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go() -> Iterator[None]:
    """Lets go of what was compiled when it has many memory mappings; Linux allows 65,530.

    Each of two processes that share all tests had 40,000, and 5 GB.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets that some tests read; without it they skip."""
    named = os.environ.get("FLOWRL_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"FLOWRL_SHARED_DATA={named} is not a folder")
    pytest.skip("needs the data sets in ../shared/data, or where FLOWRL_SHARED_DATA says")


@pytest.fixture(scope="session")
def parity_packages() -> None:
    """Skips a test that compares with torch and transformers where they are not installed."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"compares with {name} (requirements-parity.txt)")
