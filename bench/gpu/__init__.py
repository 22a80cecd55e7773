"""Report on a GPU in two calls of a few minutes: build, tests, figures."""
