"""The verbs a user runs. They assemble; they compute nothing."""
