# The usual targets for the commands in tools/, which install what they need. ARGS are passed on:
#
#   make check ARGS='tests/unit -k journal'

.PHONY: check lint lab bench clean

check:
	tools/test $(ARGS)

# All but the tests: of pytest only its version.
lint:
	tools/test --version

lab:
	tools/test tests/lab $(ARGS)

bench:
	tools/bench/run $(ARGS)

clean:
	rm -rf build dist debian/prepared .hypothesis .mypy_cache .pytest_cache .ruff_cache
