"""The two commands that train nothing: `fasttune data` and `fasttune plan`."""
