"""The tasks that come with Netwright."""
