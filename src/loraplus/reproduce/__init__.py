"""The paper's experiments by name: `loraplus reproduce`, or `reproduce` in `command.py`."""
