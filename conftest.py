"""Real servers for every test: see `stack.testing`."""

pytest_plugins = ["stack.testing"]
