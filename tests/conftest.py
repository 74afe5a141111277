"""The project's own tests use the plugin that users get: from its entry point if kvtcp is installed, else by name."""

from importlib.metadata import entry_points

if not any(entry.value == "kvtcp.testing.pytest_plugin" for entry in entry_points(group="pytest11")):
    pytest_plugins = ["kvtcp.testing.pytest_plugin"]

pytest_plugins = [*globals().get("pytest_plugins", []), "pytester"]
